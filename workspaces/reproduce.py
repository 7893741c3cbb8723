"""The published FedAvg figures, on the platform: `python -m workspaces.reproduce`.

FLamby's protocol for Fed-Heart-Disease (du Terrail et al., "FLamby: Datasets and Benchmarks for
Cross-Silo Federated Learning in Realistic Healthcare Settings", NeurIPS 2022): batches of 4, 100
local updates, 15 rounds, SGD with learning rate 0.001, seeds 42 to 46, accuracy per hospital.
"""

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from workspaces.running import ADMIN, Federation

HERE = Path(__file__).resolve().parent
HOSPITALS = ("cleveland", "hungary", "switzerland", "va")
PUBLISHED = {"cleveland": 0.731, "hungary": 0.719, "switzerland": 0.650, "va": 0.640}
SEEDS = range(42, 47)
ROUNDS = 15


def main() -> int:
    """Run the five seeds and print ours beside the published means."""
    with tempfile.TemporaryDirectory(prefix="flrepro-", ignore_cleanup_errors=True) as folder:
        data = {site: {"heart": HERE / "heart" / "data" / f"{site}.csv"} for site in HOSPITALS}
        with Federation(Path(folder), data) as federation:
            for site in HOSPITALS:
                federation.local(site, "policy.yml", "allow_foreign_code_unsandboxed: true\n")
            federation.start_all()
            runs = [_run(federation, number, seed) for number, seed in enumerate(SEEDS, 1)]
    table = Table("hospital", "ours, mean", "standard deviation", "published", box=None)
    for site in HOSPITALS:
        values = [run[site] for run in runs]
        table.add_row(
            site,
            f"{statistics.mean(values):.3f}",
            f"{statistics.stdev(values):.3f}",
            f"{PUBLISHED[site]:.3f}",
        )
    ours = statistics.mean(statistics.mean(run.values()) for run in runs)
    table.add_row("mean", f"{ours:.3f}", "", f"{statistics.mean(PUBLISHED.values()):.3f}")
    Console().print(table)
    return 0


def _run(federation: Federation, number: int, seed: int) -> dict[str, float]:
    """Run the heart job with one seed; return each hospital's accuracy of the last model."""
    job = federation.kit(ADMIN) / "transfer" / f"heart-{seed}"
    shutil.copytree(HERE / "heart" / "code", job / "code")
    spec = yaml.safe_load((HERE / "heart" / "job.yml").read_text())
    spec |= {"seed": seed, "rounds": ROUNDS, "workflow": ["scatter_gather"]}
    spec["args"]["learning_rate"] = 0.001
    (job / "job.yml").write_text(yaml.safe_dump(spec))
    print(f"seed {seed} ...", file=sys.stderr, flush=True)
    done = federation.console(f"submit_job heart-{seed} --wait")
    if done.returncode:
        raise RuntimeError(f"seed {seed} failed:\n{done.stdout}\n{done.stderr}")
    rounds = federation.ask(f"show_metrics {number}")["data"]["rounds"]
    last = next(item for item in rounds if item["round"] == ROUNDS)
    return {site: last["sites"][site]["accuracy"] for site in HOSPITALS}


if __name__ == "__main__":
    sys.exit(main())
