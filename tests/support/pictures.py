"""Pictures of a run, as the dashboard gets them."""

from collections.abc import Sequence
from typing import Any

NEWS = (
    "va declined: policy byoc = none",
    "round 8/15 closed: all participants answered",
    "model 8: accuracy .760, the best so far",
)


def picture(run: int = 7, news: Sequence[str] = NEWS) -> dict[str, Any]:
    """A run in its ninth round: two sites have answered, one trains, one declined."""
    return {
        "server": {"project": "heart", "name": "server", "state": "serving"},
        "runs": [
            {"run": 5, "name": "heart", "status": "aborted"},
            {"run": 6, "name": "heart", "status": "finished"},
            {"run": 7, "name": "heart", "status": "training"},
        ],
        "run": {
            "run": run,
            "name": "heart",
            "status": "training",
            "reason": "",
            "ended": "",
            "round": 9,
            "rounds": 15,
            "min_clients": 3,
            "waiting": ["switzerland"],
            "accepted": ["cleveland", "hungary"],
            "answers": {
                "cleveland": "ok",
                "hungary": "ok",
                "switzerland": "ok",
                "va": "declined: policy byoc = none",
            },
            "best_round": 8,
            "metric": "accuracy",
            "timers": {"deadline/9": 107.4},
        },
        "rounds": [
            {"round": number, "score": 0.76 - 0.3 / (number + 1) ** 2, "best": number == 8}
            for number in range(9)
        ],
        "last_scores": {"cleveland": 0.746, "hungary": 0.76},
        "sites": [
            _site("cleveland", [7, 9, "uploaded", 0.3]),
            _site("hungary", [7, 9, "uploaded", 0.9]),
            _site("switzerland", [7, 9, "epoch 1/1 60 %", 12.4]),
            _site("va", None),
        ],
        "news": list(news),
    }


def _site(name: str, report: list[Any] | None) -> dict[str, Any]:
    return {
        "name": name,
        "state": "live",
        "last_seen_s": 0.1,
        "runs": [] if report is None else [report],
    }
