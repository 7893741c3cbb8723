import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.core.errors import FLError, InvalidArgumentError, PermissionDeniedError
from flplatform.files import shell, shell_words
from flplatform.files.tree import Mount, Tree

TEXT = "one\n\n\ntwo\tTabs\nthree\n"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "site.log").write_text(TEXT)
    (logs / "big.log").write_text("".join(f"line {n} \x1b[2J é\n" for n in range(100_000)))
    (logs / ".hidden").write_text("")
    (logs / "old").mkdir()
    (logs / "old" / "a.log").write_text("")
    os.utime(logs / "site.log", (1_000_000_000, 1_000_000_000))
    os.utime(logs / "big.log", (2_000_000_000, 900_000_000))
    (tmp_path / "secret").write_text("secret")
    return Tree({"logs": Mount(tmp_path, ("logs",))})


def look(tree: Tree, *words: str) -> str:
    return shell.run(shell_words.parse(words), tree, {}).text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("pwd server", "/\n"),
        ("ls server", "logs/\n"),
        ("ls server logs", "big.log\nold/\nsite.log\n"),
        ("ls server -a logs", ".hidden\nbig.log\nold/\nsite.log\n"),
        ("ls server -r logs/", "site.log\nold/\nbig.log\n"),
        ("ls server logs/site.log", "site.log\n"),
        ("ls server -R logs", "logs:\nbig.log\nold/\nsite.log\n\nlogs/old:\na.log\n"),
        ("cat server logs/site.log", TEXT),
        ("cat server -s logs/site.log", "one\n\ntwo\tTabs\nthree\n"),
        ("cat server -T logs/site.log", TEXT.replace("\t", "^I")),
        (
            "cat server -sn logs/site.log",
            "     1  one\n     2  \n     3  two\tTabs\n     4  three\n",
        ),
        ("cat server -sb logs/site.log", "     1  one\n\n     2  two\tTabs\n     3  three\n"),
        ("head server -n 1 logs/site.log", "one\n"),
        ("head server -n 0 logs/site.log", ""),
        ("head server -c 6 logs/site.log", "one\n\n\n"),
        ("tail server -n 2 logs/site.log", "two\tTabs\nthree\n"),
        ("tail server -n2 logs/site.log", "two\tTabs\nthree\n"),
        ("tail server -c 4 logs/site.log", "ree\n"),
        ("tail server -n 99 logs/site.log", TEXT),
        ("grep server tabs logs/site.log", ""),
        ("grep server -in tabs logs/site.log", "4:two\tTabs\n"),
        ("grep server -b three logs/site.log", "15:three\n"),
        ("grep server -vc t logs/site.log", "3\n"),
        ("grep server -E ^t.+e+$ logs/site.log", "three\n"),
        ("grep server . logs/site.log", ""),
        ("grep server -- -x logs/site.log", ""),
    ],
)
def test_what_commands_show(tree, words, text):
    assert look(tree, *words.split()) == text


def test_ls_by_size_and_time(tree):
    assert look(tree, "ls", "server", "-S", "logs").startswith("big.log\n")
    assert look(tree, "ls", "server", "-t", "logs").index("site.log") < look(
        tree, "ls", "server", "-t", "logs"
    ).index("big.log")
    assert look(tree, "ls", "server", "-u", "logs").startswith("big.log\n")
    first = look(tree, "ls", "server", "-lu", "logs").split("\n")[0].split()
    assert first[0].startswith("-rw")
    assert first[2:] == ["2033-05-18T03:33:20Z", "big.log"]


def test_env_tells_an_allow_list_only(tree, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("FLP_PASSWORD_FILE", "/secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    shown = shell.run(shell_words.parse(("env", "all")), tree, {"FLP_NAME": "a\nb"}).text
    names = {line.partition("=")[0] for line in shown.splitlines()}
    assert {"OMP_NUM_THREADS", "FLP_NAME"} <= names <= shell.VARIABLES | {"FLP_NAME"}
    assert "FLP_NAME=a?b\n" in shown


@pytest.mark.parametrize(
    ("words", "targets", "path"),
    [
        ("ls client", ("client",), ""),
        ("ls client a b", ("client", "a", "b"), ""),
        ("ls client a b logs", ("client", "a", "b"), "logs"),
        ("ls client logs .", ("client", "logs"), ""),
        ("ls client runs/7", ("client",), "runs/7"),
        ("ls all -l logs", ("all",), "logs"),
        ("cat client a logs/x", ("client", "a"), "logs/x"),
        ("cat client logs/x", ("client",), "logs/x"),
        ("grep client a b pat logs/x -n", ("client", "a", "b"), "logs/x"),
        ("pwd client a", ("client", "a"), ""),
    ],
)
def test_targets_and_paths(words, targets, path):
    parsed = shell_words.parse(tuple(words.split()))
    assert (parsed.targets, parsed.path) == (targets, path)


def test_whom_a_look_reaches():
    def reached(words):
        parsed = shell_words.parse(tuple(words.split()))
        return [site for site in ("a", "b", "logs") if parsed.reaches(site)]

    assert reached("ls client a logs") == ["a"]
    assert reached("cat client logs/x") == ["a", "b", "logs"]
    assert reached("cat client a logs/x") == ["a"]
    assert reached("ls all logs") == ["a", "b", "logs"]
    assert reached("ls server logs") == []


INJECTIONS = [
    "../secret", "/etc/passwd", "logs/../secret", "logs/..%2fsecret", "%2e%2e/secret",
    "logs/%252e%252e/secret", "..\\secret", "logs\\site.log", "logs/\0", "logs/site.log\n/etc/x",
    "logs/$(id)/../x", "; rm -rf /", "`id`", "$(cat /etc/passwd)", "| nc evil 1", "&& id",
    "secret", "startup/participant.key", "~/x", "/proc/self/environ", "logs/" + "x" * 300, "/",
    "//", "logs//site.log", "logs/./site.log", "-", "--help", "*", "logs/*",
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "bad"), list(itertools.product(["ls", "cat", "head", "tail", "grep"], INJECTIONS))
)
def test_no_operand_leads_out(tree, command, bad):
    words = (command, "server", *(["x"] if command == "grep" else []), "--", bad)
    with pytest.raises(FLError) as caught:
        look(tree, *words)
    assert not isinstance(caught.value, OSError)


@pytest.mark.parametrize(
    "words",
    ["", "rm server x", "sh -c id", "ls", "ls a", "cat server", "grep server x", "pwd server x",
     "ls server logs x", "cat server -x logs/a", "head server -n -1 logs/a", "cat server a logs/b",
     "head server -n 1e9 logs/a", "tail server -c ٣ logs/a", "env client --login",
     "cat client site-1", "ls server -l=3"],
)  # fmt: skip
def test_words_that_do_not_fit(words):
    with pytest.raises(InvalidArgumentError):
        shell_words.parse(tuple(words.split()))


@given(st.lists(st.text(max_size=20), max_size=6))
def test_any_words_are_parsed_or_refused(words):
    for command in shell_words.COMMANDS:
        try:
            parsed = shell_words.parse((command, *words))
        except InvalidArgumentError:
            continue
        assert parsed.targets[0] in ("server", "client", "all")
        assert not parsed.path or parsed.path.split("/")[0] in shell_words.ROOTS


def test_answers_are_bounded_and_say_so(tree):
    for words in (
        ("cat", "server", "logs/big.log"),
        ("grep", "server", "-v", "zzz", "logs/big.log"),
        ("head", "server", "-n", "99999", "logs/big.log"),
        ("tail", "server", "-n", "99999", "logs/big.log"),
        ("tail", "server", "-c", "999999999", "logs/big.log"),
        ("head", "server", "-c", "999999999", "logs/big.log"),
    ):
        shown = shell.run(shell_words.parse(words), tree, {})
        assert shown.cut
        assert 900_000 < len(json.dumps({"text": shown.text})) <= 1 << 20
    assert shown.text.startswith("line 0 ")
    tail = look(tree, "tail", "server", "-n", "99999", "logs/big.log")
    assert tail.endswith("line 99999 \x1b[2J é\n")
    assert tail.startswith("line ")


def test_time_is_bounded(tree):
    ticks = itertools.count(step=4.0)
    shown = shell.run(
        shell_words.parse(("grep", "server", "zzz", "logs/big.log")), tree, {}, lambda: next(ticks)
    )
    assert (shown.text, shown.cut) == ("", "cut after 10 s")


def test_a_line_without_end_is_several(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "x.log").write_bytes(b"a" * 200_000 + b"\xff\nb\n")
    tree = Tree({"logs": Mount(tmp_path, ("logs",))})
    assert look(tree, "grep", "server", "-c", "a", "logs/x.log") == "4\n"
    assert look(tree, "grep", "server", "-b", "b", "logs/x.log") == "200002:b\n"


def test_an_empty_list_allows_nothing():
    shell_words.demand_allowed("ls", ("ls", "cat"))
    with pytest.raises(PermissionDeniedError) as caught:
        shell_words.demand_allowed("ls", ())
    assert caught.value.rule == "policy allowed_shell_cmds = none"
