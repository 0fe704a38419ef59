"""`qwen3 follow`: computes a share of a model that another machine leads."""

import logging
import sys
from importlib import import_module
from typing import Annotated

import typer

from qwen3_mlx.cli.option_groups import option
from qwen3_mlx.errors import NoLeaderError


def follow(
    join: Annotated[
        str, option("--join", metavar="HOST:PORT", text="Where the leader waits for followers.")
    ],
    key: Annotated[
        str,
        option("--key", text="Key of the cluster, as the leader shows it; - reads it from stdin."),
    ],
    rank: Annotated[int | None, option("--rank", text="Rank to take (default: any).")] = None,
) -> None:
    """Compute a share of a model that another machine leads, until the leader ends.

    The leader shows the whole command where --hosts has the name join. It decides
    all: model, share and when to compute. Nothing is served here.
    """
    host, _, port = join.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--join must be HOST:PORT, such as 169.254.10.1:21500, not {join}")
    if is_started := key == "-":  # by a leader, which says itself why it ends
        logging.getLogger("qwen3_mlx.cluster.follow").setLevel(logging.ERROR)
        key = sys.stdin.readline().strip()
    following = import_module("qwen3_mlx.api.follow")  # MLX's modules, which --help does not need
    try:
        following.follow(host, int(port), key, rank)
    except NoLeaderError:
        if not is_started:
            raise
        raise typer.Exit(1) from None
