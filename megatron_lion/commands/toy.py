"""`megatron-lion toy`: measures both sides of the convergence bounds on a two-dimensional problem."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.streams import next_steps, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = "Measure both sides of the convergence bounds on a two-dimensional problem"


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add("--output", type=str, default="./toy", metavar="DIR", help="folder for figures, toy.md and toy.csv")
    add("--lr", type=float, default=0.01, help="learning rate eta")
    add(
        "--weight-decay",
        type=float,
        default=0.1,
        help="lambda; the box constraint is |theta_i| <= 1/lambda, and 0 means no box",
    )
    add("--betas", type=float, nargs=2, default=[0.9, 0.99], metavar=("B1", "B2"), help="beta1 and beta2")
    add(
        "--init-exp-avg",
        type=str,
        default="zeros",
        choices=["zeros", "first_gradient"],
        help="momentum before the first step: zeros (as in practice) or the first gradient (as in the proof)",
    )
    add("--noise-std", type=float, default=1.0, help="standard deviation of each coordinate's gradient noise")
    add("--steps", type=int, default=2000, help="steps of each run")
    add("--starts", type=int, default=5, help="number of starting points")
    add("--repeats", type=int, default=5, help="number of noise sequences for each starting point")
    add("--seed", type=int, default=0, help="random seed of starting points and noise")
    add(
        "--conventions",
        action="store_true",
        help="also compare which betas and initial momentum fit the reference values",
    )
    add("--no-figures", action="store_true", help="write tables only")


def run(args: Any) -> None:
    """Simulates, writes the folder, and prints the tables to stdout."""
    from megatron_lion.compare.print_tables import print_markdown
    from megatron_lion.errors import ConfigError
    from megatron_lion.files import storage_errors, write_whole
    from megatron_lion.toy.experiment import EXPERIMENTS, ToySettings, run_toy
    from megatron_lion.toy.toy_checks import theorem_points
    from megatron_lion.toy.toy_report import curves_csv, has_reference, markdown

    beta1, beta2 = args.betas
    try:
        settings = ToySettings(
            lr=args.lr,
            weight_decay=args.weight_decay,
            betas=(beta1, beta2),
            init_exp_avg=args.init_exp_avg,
            noise_std=args.noise_std,
            steps=args.steps,
            starts=args.starts,
            repeats=args.repeats,
            seed=args.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    experiments = [e for e in EXPERIMENTS if e != "constrained" or settings.weight_decay > 0]
    results = [run_toy(experiment, settings) for experiment in experiments]
    points = {experiment: theorem_points(experiment, settings) for experiment in experiments}
    text = markdown(results, points, with_conventions=args.conventions)
    folder = Path(args.output)
    with storage_errors(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "toy.md", text.encode())
    write_whole(folder / "toy.csv", curves_csv(results).encode())
    figures: list[str] = []
    if not args.no_figures:
        from megatron_lion.toy.toy_figures import plot_inequality, plot_paths, plot_theorem

        plot_inequality(results, folder / "toy_inequality.png", with_reference=has_reference(settings))
        plot_paths(settings, folder / "toy_paths.png")
        figures = ["toy_inequality.png", "toy_paths.png"]
        if any(points.values()):
            plot_theorem({e: p for e, p in points.items() if p}, folder / "toy_theorem.png")
            figures.append("toy_theorem.png")
    print_markdown(text)
    say(f"\nwritten: {', '.join([str(folder / 'toy.md'), 'toy.csv', *figures])}")
    next_steps(["megatron-lion", "reproduce", "toy", "--output", "reproduction"])
