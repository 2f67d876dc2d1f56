"""Draws the figure of the README from the table in SPEED.md.

    python examples/benchmarks/figure.py

Writes examples/guides/images/speed.png, or --output.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BENCHMARKS = Path(__file__).resolve().parent
FIGURE = BENCHMARKS.parent / "guides" / "images" / "speed.png"
#: Cases of the table, and how the figure names them
CASES = {
    "CartPole, 8 envs": "CartPole\n8 environments",
    "Pendulum, 4 envs": "Pendulum\n4 environments",
    "HalfCheetah, 8 envs": "HalfCheetah\n8 environments",
    "CartPole with masks, 8 envs": "CartPole with masks\nbeside MaskablePPO",
    "CartPole with LSTM, 8 envs": "CartPole with LSTM\nbeside RecurrentPPO",
}
#: The table's contenders, names and colours
CONTENDERS = {
    "peer": ("SB3 or sb3-contrib", "#9aa5b1"),
    "PPOPlus": ("PPOPlus", "#4a90d9"),
    "PPOPlus compiled": ("PPOPlus(compile=True)", "#1b4f8f"),
}
PEERS = ("SB3", "MaskablePPO", "RecurrentPPO")


def read_speed(table: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Return steps per second and the ratio to the peer, of each contender of each case."""
    speed: dict[str, dict[str, tuple[float, float]]] = {}
    for line in table.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 10 and cells[0] in CASES:
            name = "peer" if cells[1] in PEERS else cells[1]
            if name in CONTENDERS:
                speed.setdefault(cells[0], {})[name] = (float(cells[4]), float(cells[7]))
    return speed


def draw(speed: dict[str, dict[str, tuple[float, float]]], file: Path) -> None:
    """Draw a group of bars for each case: how many times as fast as the peer."""
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    height = 0.26
    for place, case in enumerate(CASES):
        for row, (name, (_, colour)) in enumerate(CONTENDERS.items()):
            if name not in speed[case]:
                continue
            steps, ratio = speed[case][name]
            y = place + (row - 1) * height
            axes.barh(y, ratio, height * 0.92, color=colour)
            axes.text(ratio + 0.08, y, f"{ratio:.1f}x   {steps:,.0f} steps/s", va="center", fontsize=9, color="#333333")
    axes.set_yticks(range(len(CASES)), CASES.values())
    axes.invert_yaxis()
    axes.set(xlim=(0, 10.5), xlabel="training speed end to end on one CPU core, as a multiple of SB3 or sb3-contrib")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour in CONTENDERS.values()]
    labels = [label for label, _ in CONTENDERS.values()]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    # White paper under dark letters is readable on dark pages too
    figure.savefig(file, dpi=110, facecolor="white")
    plt.close(figure)


def main(file: Path = FIGURE) -> None:
    """Draw the figure."""
    draw(read_speed(BENCHMARKS / "SPEED.md"), file)
    print(f"Saved {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FIGURE)
    main(parser.parse_args().output)
