"""Sites that leave a run and come back, tasks that are given up, barred sites, a deleted run."""

import re
from pathlib import Path

from flplatform.core import events as ev


def run_processes(running, site: str) -> list[str]:
    """Return the command lines of a site's processes other than the site's own."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == running.processes[site].pid:
            continue
        try:
            words = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if str(running.kit(site)).encode() in words:
            found.append(words.decode(errors="replace"))
    return found


def test_sites_leave_and_a_run_is_deleted(federation):
    running = federation("site-1", "site-2", "site-3")
    running.start_all()
    running.steps_job(rounds=3, min_clients=1, wait_after_min_s=60)
    go = {(s, r): running.hold(f"site-{s}", r) for s in (1, 2, 3) for r in (1, 2)}
    assert running.console("submit_job steps").returncode == 0
    assert len(running.wait_event(1, ev.RoundOpened).participants) == 3
    running.wait_for(lambda: run_processes(running, "site-3"), "the run process of site-3")

    # One site leaves in the middle of its task; nothing of the run remains there.
    left = running.ask("abort client site-3 --run 1")
    assert left["ok"], left
    failed = running.wait_event(1, ev.TaskFailed, site="site-3")
    assert failed.error == "withdrawn by admin@example.org"
    folder = running.kit("site-3") / "state" / "runs"
    running.wait_for(lambda: not run_processes(running, "site-3"), "the process tree to end")
    running.wait_for(lambda: not any(folder.glob("run-*")), "the run's folder to go")

    # It joins again, by a newly signed start, and works from the next round on.
    again = running.ask("start client site-3 --run 1")
    assert again["ok"], again
    assert running.wait_event(1, ev.TargetsAdded).sites == ("site-3",)
    running.wait_for(
        lambda: (
            [e.site for e in running.events(1) if isinstance(e, ev.SiteAnswered)].count("site-3")
            == 2
        ),
        "site-3 to answer again",
    )

    # One gives its task up and stays.
    assert running.ask("abort_task site-2 --run 1")["ok"]
    assert running.wait_event(1, ev.TaskFailed, site="site-2").error == (
        "aborted by admin@example.org"
    )
    go[1, 1]()
    closed = running.wait_event(1, ev.RoundClosed, round=1)
    assert [target.site for target in closed.contributions] == ["site-1"]
    opened = running.wait_event(1, ev.RoundOpened, round=2)
    assert opened.participants == ("site-1", "site-2", "site-3")

    # One is barred: it is excused, and no new job may name it.
    done = running.console(
        "disable_client site-2", "check_status client site-2", "submit_job steps --sites site-2"
    )
    assert done.stdout.count("disabled") == 2, done.stdout
    assert "site-2 refused: disabled" in done.stderr
    go[1, 2]()
    go[3, 2]()
    assert running.wait_event(1, ev.RoundClosed, round=2).stragglers == ("site-2",)
    assert running.wait_event(1, ev.RunEnded).status == "finished"

    # Deleted, the run leaves its number and its events, here and at the sites.
    blobs = running.kit("server") / "state" / "blobs"
    assert any(path.stat().st_size > 4000 for path in blobs.rglob("*") if path.is_file())
    done = running.console("delete_run_number 1", "list_runs", "list_runs --all", "show_metrics 1")
    assert "4 ok" in done.stdout
    assert "no runs yet" in done.stdout
    assert re.search(r"\b1\s+steps\s+deleted\b", done.stdout), done.stdout
    assert "run 1 was deleted by admin@example.org on" in done.stderr
    assert not any(path.stat().st_size > 4000 for path in blobs.rglob("*") if path.is_file())
    for site in running.sites:
        assert not any((running.kit(site) / "logs").glob("run-1.log*"))
    assert running.wait_event(1, ev.RunEnded).status == "finished"
