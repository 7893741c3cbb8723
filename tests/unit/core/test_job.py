import pytest

from flplatform.core.errors import ConfigError, InvalidArgumentError
from flplatform.core.job import Watch, check_targets, parse_job

SMALLEST = """\
name: hello
executor: {module: hello}
initial_model: {function: "hello:initial_model"}
"""


def job(*lines: str):
    """Return the smallest job; a line replaces the one of the same key."""
    keys = {line.partition(":")[0] for line in lines}
    kept = [line for line in SMALLEST.splitlines() if line.partition(":")[0] not in keys]
    return parse_job("\n".join([*kept, *lines]))


def test_what_is_not_said_has_defaults():
    spec = job()
    assert spec.workflow == ("scatter_gather", "cross_site_validation")
    assert (spec.rounds, spec.min_clients, spec.wait_after_min_s) == (1, 1, 10.0)
    assert (spec.on_deadline, spec.round_deadline_s) == ("extend", 600.0)
    assert (spec.aggregator.name, spec.aggregator.args) == ("weighted_mean", {})
    assert (spec.data, spec.environment, spec.watch) == ((), "default", None)


def test_all_problems_are_listed_with_their_lines():
    with pytest.raises(ConfigError) as caught:
        job("rounds: 0", "min_client: 2", "on_deadline: wait")
    found = "\n".join(caught.value.problems)
    assert "job.yml:4: rounds: should be greater than or equal to 1, got 0" in found
    assert "job.yml:5: min_client: unknown key; did you mean 'min_clients'?" in found
    assert "job.yml:6: on_deadline: should be 'extend' or 'abort', got 'wait'" in found


def test_a_job_needs_name_executor_and_initial_model():
    with pytest.raises(ConfigError) as caught:
        parse_job("description: nothing else")
    missing = {problem.split(": ")[1] for problem in caught.value.problems}
    assert missing == {"name", "executor", "initial_model"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("executor: {}", "executor: give exactly one of module (functions) and script (a loop)"),
        ("executor: {module: a, script: b.py}", "give exactly one of module"),
        ("executor: {module: a-b}", "module 'a-b' is not a dotted Python name"),
        ('executor: {module: "os;x"}', "module 'os;x' is not a dotted Python name"),
        ("executor: {script: ../x.py}", "script '../x.py' must be a path inside code/"),
        ("executor: {script: /bin/sh}", "script '/bin/sh' must be a path inside code/"),
        ("initial_model: {}", "initial_model: give exactly one of file, function and run"),
        ("initial_model: {file: a, run: 1}", "give exactly one of file, function and run"),
        ("initial_model: {function: os}", "function 'os' is not module:name"),
        ("initial_model: {run: -1}", "initial_model.run: should be greater than or equal to 0"),
        ("workflow: []", "workflow: Tuple should have at least 1 item"),
        ("workflow: [round_robin]", "workflow[0]: should be 'scatter_gather' or"),
        ("workflow: [scatter_gather, scatter_gather]", "workflow: names an entry twice"),
        ("data: [heart, heart]", "data: names an entry twice"),
        ("name: Hello World", "name: 'Hello World' is not a name"),
        ("rounds: 2.5", "rounds: "),
        ('min_clients: "2"', "min_clients: "),
        ("round_deadline_s: 0", "round_deadline_s: should be greater than 0"),
        ("wait_after_min_s: -1", "wait_after_min_s: should be greater than or equal to 0"),
        ("seed: -1", "seed: should be greater than or equal to 0"),
        ("watch: {metric: accuracy, mode: best}", "watch.mode: should be 'max' or 'min'"),
    ],
)
def test_what_is_wrong_is_named(line, problem):
    with pytest.raises(ConfigError) as caught:
        job(line)
    assert problem in "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    "line",
    [
        "executor: {module: package.heart}",
        "executor: {script: train/loop.py}",
        "initial_model: {file: start.safetensors}",
        "initial_model: {run: 3, round: last}",
        "initial_model: {run: 3, round: 12}",
        "wait_after_min_s: 0",
        "args: {layers: [8, 1], rate: 1e-3, name: null}",
    ],
)
def test_what_is_right_is_taken(line):
    key = line.partition(":")[0]
    assert getattr(job(line), key) != getattr(job(), key)


def test_a_watched_metric_beats_strictly():
    best, least = Watch(metric="accuracy"), Watch(metric="loss", mode="min")
    assert best.better(0.6, than=0.5)
    assert not best.better(0.5, than=0.5)
    assert least.better(0.4, than=0.5)
    assert not least.better(0.5, than=0.5)


def test_targets_that_make_a_run():
    check_targets(("site-1", "site-2"), 2)


@pytest.mark.parametrize(
    ("sites", "min_clients", "message"),
    [
        ((), 1, "sites: names no site"),
        (("Site 1",), 1, "sites: 'Site 1' is not a site name"),
        (("../x",), 1, "sites: '../x' is not a site name"),
        (("a", "b", "a"), 1, "sites: names a site twice"),
        (("a", "b"), 3, "min_clients: is 3, but the run has only 2 target sites"),
    ],
)
def test_targets_that_cannot_make_a_run_are_refused(sites, min_clients, message):
    with pytest.raises(InvalidArgumentError, match=message.replace(".", r"\.")):
        check_targets(sites, min_clients)
