"""Train a recipe file at several learning rates, and export the best.

python examples/compare.py
"""

import distrain


def main() -> None:
    runs = {
        lr: distrain.train(
            "recipes/iris.yaml", optim__lr=lr, train={"epochs": 20, "steps": None}, run_dir=f"runs/iris-{lr}"
        )
        for lr in (0.001, 0.01, 0.1)
    }
    for lr, run in runs.items():
        print(f"lr {lr}: loss {run.best.value:.4f} at step {run.best.step}")
    best = min(runs.values(), key=lambda run: run.best.value)
    best.export("runs/iris-best.safetensors", overwrite=True)


if __name__ == "__main__":
    main()
