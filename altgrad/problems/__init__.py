"""The table of problems: name -> "package.module:factory", a frozen dataclass of settings whose `build` gives the problem."""

TABLE = {
    "digits": "altgrad.problems.images:Digits",
    "mnist": "altgrad.problems.images:MNIST",
    "fashion-mnist": "altgrad.problems.images:FashionMNIST",
    "cifar10": "altgrad.problems.images:CIFAR10",
    "quadratic": "altgrad.problems.quadratic:Quadratic",
    "control": "altgrad.problems.control:Control",
    "gymnasium": "altgrad.problems.gymnasium:Gymnasium",
    "char-lm": "altgrad.problems.char_lm:CharacterModel",
    "accuracy": "altgrad.problems.accuracy:Accuracy",
    "digits-graph": "altgrad.problems.digits_graph:DigitsGraph",
    "row-digits": "altgrad.problems.row_digits:RowDigits",
    "hopfield-digits": "altgrad.problems.hopfield:HopfieldDigits",
    "rasterizer": "altgrad.problems.rasterizer:Rasterizer",
    "recurrence": "altgrad.problems.recurrence:Recurrence",
    "spiking-digits": "altgrad.problems.spiking:SpikingDigits",
}
