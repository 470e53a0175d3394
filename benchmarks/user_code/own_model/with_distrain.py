from parts import Net, digits

import distrain

distrain.train(
    task="classification",
    model=Net,
    data=digits,
    batch={"global": 64},
    optim={"lr": 0.01},
    train={"epochs": 3},
    eval={"every": "1 epoch", "metrics": ["accuracy"], "best": "accuracy"},
    run_dir="runs/own-model",
)
