import asyncio
import csv
import io
import json

import pytest

from flplatform.core.control import MatrixView, RoundMetrics
from flplatform.core.errors import NotFoundError
from flplatform.files.digest import digest_of
from flplatform.server.file_tree import FileTree
from tests.unit.server.scene import Scene, play

MATRIX = MatrixView(
    owners=("a", "global"),
    sites=("a", "b"),
    cells={("a", "a"): {"loss": 0.5, "=cmd|x": -1.0}, ("global", "a"): {"loss": 0.25}},
    gaps={("*", "b"): "declined: @SUM(1)\n\x1b[2J"},
    global_round=1,
    complete=True,
    metric="loss",
    mode="min",
)


def rows(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode())))


def metrics(_run: int) -> list[RoundMetrics]:
    return [
        RoundMetrics(0, None, False, {}, {}, "blake3:0"),
        RoundMetrics(1, 0.25, True, {"a": {"loss": 0.25}}, {"b": {"+x": 1e-9}}, "blake3:1"),
    ]


def tree(scene: Scene, matrix: MatrixView) -> FileTree:
    return FileTree(scene.runs, metrics, lambda _: matrix)


async def finish(scene: Scene) -> None:
    """Run one round at two sites to its end."""
    scene.obeying("a", "b")
    await scene.submit(rounds=1)
    while not scene.runs.ended(1):
        for site in ("a", "b"):
            for task in scene.runs.tasks.of(site):
                await scene.training.submit_result(site, scene.result(task))
        await asyncio.sleep(0)


def test_what_a_run_leaves(scene: Scene) -> None:
    async def it() -> None:
        await finish(scene)
        files = {file.name: file for file in await tree(scene, MATRIX).of_run(1)}
        assert list(files) == [
            "best.safetensors", "cross_val.csv", "cross_val.json", "job.zip", "log.txt",
            "metrics.csv", "models/round-0.safetensors", "models/round-1.safetensors",
        ]  # fmt: skip
        state = scene.runs.view(1).state
        for number in (0, 1):
            file = files[f"models/round-{number}.safetensors"]
            assert file.blob.digest == state.models[number].digest
            assert file.content is None
        assert files["job.zip"].blob.digest == state.opened.job_blob.digest
        for file in files.values():
            if file.content is not None:
                assert (file.blob.digest, file.blob.size) == (
                    digest_of(file.content),
                    len(file.content),
                )
        lines = files["log.txt"].content.decode().splitlines()
        assert len(lines) == len(scene.events())
        assert any(line.endswith("model of round 1 published") for line in lines)
        await scene.close()

    play(it())


def test_tables_that_no_spreadsheet_obeys(scene: Scene) -> None:
    async def it() -> None:
        await finish(scene)
        files = {file.name: file for file in await tree(scene, MATRIX).of_run(1)}
        assert rows(files["metrics.csv"].content) == [
            ["round", "site", "when", "metric", "value", "best"],
            ["1", "", "global", "score", "0.25", "best"],
            ["1", "a", "global", "loss", "0.25", "best"],
            ["1", "b", "training", "'+x", "1e-09", "best"],
        ]
        assert rows(files["cross_val.csv"].content) == [
            ["model_owner", "data_site", "metric", "value", "gap"],
            ["a", "a", "'=cmd|x", "-1.0", ""],
            ["a", "a", "loss", "0.5", ""],
            ["global", "a", "loss", "0.25", ""],
            ["*", "b", "", "", "declined: @SUM(1)??[2J"],
        ]
        matrix = json.loads(files["cross_val.json"].content)
        assert matrix["cells"][1] == {
            "model_owner": "global", "data_site": "a", "metrics": {"loss": 0.25},
        }  # fmt: skip
        assert (matrix["metric"], matrix["complete"]) == ("loss", True)
        await scene.close()

    play(it())


def test_a_run_without_a_matrix_and_one_that_is_none(scene: Scene) -> None:
    async def it() -> None:
        await finish(scene)
        empty = MatrixView((), (), {}, {}, 0, False, "", "max")
        names = [file.name for file in await tree(scene, empty).of_run(1)]
        assert not [name for name in names if name.startswith("cross_val")]
        with pytest.raises(NotFoundError):
            await tree(scene, empty).of_run(9)
        await scene.close()

    play(it())
