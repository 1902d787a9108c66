"""Speed and memory of every model, as ratios measured in one run.

    python bench.py                                       # every model: batch 4, 128 x 128
    python bench.py --precision bf16                      # for GPUs and CPUs that multiply it
    python bench.py --device cuda --precision bf16 --compile --batch-size 32
    python bench.py --models ssn phiseg --rounds 9 --json bench.json
    python bench.py --tables costs                        # what a method adds to its U-Net
    python bench.py --tables scaling --models ssn         # against side, batch, samples, rank
    python bench.py --tables evaluation                   # a test split: network beside metrics

How to read it. Machines are noisy, so trust ratios: what is compared runs in turn, A B A B, and
a figure is the median over the rounds; a ratio is the median of the rounds' own ratios, +- half
the distance of its quartiles. All models have their default configuration, the papers' LIDC one.
    step      forward, loss, backward and optimiser as train.py does them, for a batch
    / plain   against the same model as built: float32, eager, contiguous, unfused optimiser
    / convs   against its convolutions alone, same precision and layout, forward and backward: no
              norm, activation, upsampling, loss or optimiser. 1 is a bound; only fused kernels
              approach it
    GFLOP     of a step, by torch's counter; on a GPU also the share of the measured matrix rate
    sample    n samples of one image, and the same n in multiples of one sample
    memory    peak of a step beyond what the model and its optimiser hold
"""

import argparse
import json
import statistics
import sys
import time
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import metrics
import models
import train
from common import UserError, cross_entropy, pick_device
from sources.files import write_text

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.linear)


# ------------------------------------------------------------------------------------ measuring


def in_turn(functions: dict, rounds: int, device) -> dict:
    """Seconds of every function in every round, {name: [rounds]}, run in turn after a warm-up."""
    def once(function):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for function in functions.values():
        once(function), once(function)
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(once(function))
    return times


def ratio(a: list, b: list) -> tuple[float, float]:
    """Median of the rounds' a / b, and half the distance of its quartiles."""
    each = sorted(x / y for x, y in zip(a, b))
    quarter = len(each) // 4
    return statistics.median(each), (each[-1 - quarter] - each[quarter]) / 2


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create while it is on; `peak` of those alive.

    Independent of the allocator, so it repeats exactly; memory inside an operation is not counted.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs))
                  if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self.seen:
                    self.seen[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, key):
        """A tensor's memory is given back."""
        self.now -= self.seen.pop(key)


def peak_memory(function, device) -> int:
    """Bytes that `function` needs at its worst, beyond what stood before."""
    function()  # what is created once, like the optimiser's state, is not counted
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Allocations() as allocations:
        function()
    return allocations.peak


def operations(function) -> int:
    """Floating-point operations by torch's counter; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matrix_rate(device, dtype) -> float:
    """Operations a second of one large matrix product: what the machine can do."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / statistics.median(in_turn({"": lambda: a @ a}, 5, device)[""])


class Convolutions(TorchFunctionMode):
    """Notes every convolution and linear layer that runs while it is on."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in CONVOLUTIONS:
            self.calls.append((function, args, kwargs or {}, out))
        return out


def convolutions_alone(function, backward: bool):
    """A function that runs the convolutions and linear layers of `function` one by one, on tensors
    of the same shape and layout, with their gradients if `backward`."""
    with Convolutions() as noted:
        function()

    def like(tensor):
        return torch.randn_like(tensor).requires_grad_(tensor.requires_grad and backward)

    calls = [(convolution, [like(x) if isinstance(x, torch.Tensor) else x for x in inputs], options,
              torch.randn_like(out)) for convolution, inputs, options, out in noted.calls]
    noted.calls.clear()  # they hold the whole graph

    def run():
        for convolution, inputs, options, gradient in calls:
            if not backward:
                with torch.no_grad():
                    convolution(*inputs, **options)
                continue
            convolution(*inputs, **options).backward(gradient)
            for tensor in inputs:
                if isinstance(tensor, torch.Tensor):
                    tensor.grad = None

    return run


# ---------------------------------------------------------------------------------- the tables


class Bench:
    """A model with inputs, and the functions to be timed."""

    def __init__(self, name: str, options, *, plain=False, batch=None, side=None, **fields):
        self.name, self.device = name, options.device
        torch.manual_seed(0)
        model = models.build(name, fields)
        self.model = model.to(self.device) if plain else models.place(model, self.device)
        batch, side = batch or options.batch_size, side or options.image_size
        size = [side] * self.model.config.dims
        classes = self.model.config.num_classes
        self.image = torch.randn(batch, self.model.config.in_channels, *size, device=self.device)
        self.label = torch.randint(classes, (batch, *size), device=self.device)
        bf16 = options.precision == "bf16" and not plain
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=not plain)
        self.loss = self.model
        if options.compile and not plain:
            self.loss = train.compiled(self.model)

    def step(self):
        """One training step, as train.py does it."""
        train.train_step(self.loss, self.optimizer, self.image, self.label, 1e-6, self.autocast())

    def forward(self):
        """The loss alone."""
        with self.autocast():
            return self.model(self.image, self.label)[0]

    def sample(self, n: int):
        """n samples of the first image."""
        with self.autocast():
            return self.model.sample(self.image[:1], n)

    def predict(self):
        """The deterministic answer for the first image."""
        with self.autocast():
            return self.model.predict(self.image[:1])


def table_of_models(options) -> list[dict]:
    """A row a model: training step, samples, memory."""
    rows, rate = [], None
    if options.device.type == "cuda":
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        rate = matrix_rate(options.device, dtype)
        print(f"measured limit: {rate / 1e12:.0f} Tflop/s ({dtype})", flush=True)
    for name in options.models:
        b, plain = Bench(name, options), Bench(name, options, plain=True)
        flops = operations(plain.step)
        with b.autocast():
            convs = convolutions_alone(b.forward, backward=True)

        def limit():
            with b.autocast():
                convs()

        times = in_turn({"step": b.step, "plain": plain.step, "convs": limit}, options.rounds,
                        options.device)
        b.model.eval()
        drawn = in_turn({"one": lambda: b.sample(1), "n": lambda: b.sample(options.samples),
                         "predict": b.predict}, options.rounds, options.device)
        step = statistics.median(times["step"])
        row = {"model": name, "parameters": sum(p.numel() for p in b.model.parameters()),
               "GFLOP": flops / 1e9, "step ms": 1e3 * step,
               "/ plain": ratio(times["step"], times["plain"]),
               "/ convs": ratio(times["step"], times["convs"]),
               "predict ms": 1e3 * statistics.median(drawn["predict"]),
               "1 sample ms": 1e3 * statistics.median(drawn["one"]),
               f"{options.samples} samples": ratio(drawn["n"], drawn["one"]),
               "memory MB": peak_memory(b.model.train() and plain.step, options.device) / 1e6}
        if rate:
            row["share of limit"] = flops / step / rate
        rows.append(row)
        show(rows)
    return rows


def table_of_costs(options) -> list[dict]:
    """What a method adds to its own U-Net, or to the convolutions of its samples."""
    rows, device = [], options.device

    def add(what, numerator, denominator):
        rows.append({"what": what, "ratio": ratio(numerator, denominator),
                     "ms": 1e3 * statistics.median(numerator)})
        show(rows)

    ssn = Bench("ssn", options)
    unet = Bench("ssn", options)
    network = nn.Sequential(unet.model.backbone, unet.model.mean)  # SSN without its distribution
    unet.loss = lambda image, label: (cross_entropy(network(image), label).mean(), {})
    unet.optimizer = torch.optim.Adam(network.parameters(), fused=True)
    times = in_turn({"ssn": ssn.step, "unet": unet.step}, options.rounds, device)
    add("ssn: step with 20 samples / cross-entropy step", times["ssn"], times["unet"])

    prob_unet = Bench("prob_unet", options)
    head = list(prob_unet.model.comb)[-1]  # a 1 x 1 convolution to the classes
    for bench, network in ((ssn, network), (prob_unet, nn.Sequential(prob_unet.model.unet, head))):
        bench.model.eval()
        network.eval()
        with torch.no_grad(), bench.autocast():
            times = in_turn({"samples": lambda: bench.sample(100),
                             "unet": lambda: network(bench.image[:1])}, options.rounds, device)
        add(f"{bench.name}: 100 samples / one U-Net pass", times["samples"], times["unet"])

    for name in ("phiseg", "hpunet", "vae_unet"):
        bench = Bench(name, options)
        bench.model.eval()
        times = in_turn({"1": lambda: bench.sample(1), "17": lambda: bench.sample(17),
                         "convs 1": convolutions_alone(lambda: bench.sample(1), backward=False),
                         "convs 17": convolutions_alone(lambda: bench.sample(17), backward=False)},
                        options.rounds, device)
        samples = [many - one for one, many in zip(times["1"], times["17"])]
        convs = [many - one for one, many in zip(times["convs 1"], times["convs 17"])]
        add(f"{name}: 16 more samples / their convolutions alone", samples, convs)

    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    distance = ((x - 64) ** 2 + (y - 64) ** 2).sqrt()
    radius = 20 + 5 * torch.randn(104, 1, 1)  # lesion-like: discs of 15 to 25 pixels
    probs = torch.sigmoid(radius[:100] - distance)
    probs = torch.stack([1 - probs, probs], 1)[:, None].to(device)  # (100, 1, 2, H, W)
    hard = models.labels_of(probs, 2)
    labels = (distance < radius[100:]).byte()[None].to(device)  # (1, 4, H, W)

    def every_metric():
        metrics.sample_scores(hard, labels)
        metrics.ncc(probs, labels)
        metrics.sample_dice(hard, labels)
        metrics.gamma_map(probs)
        metrics.uncertainty_map(probs)

    times = in_turn({"metrics": every_metric}, options.rounds, device)["metrics"]
    rows.append({"what": "all metrics of a case: 100 samples, 4 annotators", "ratio": None,
                 "ms": 1e3 * statistics.median(times)})
    show(rows)
    return rows


def table_of_scaling(options) -> list[dict]:
    """Time and memory of a step against side and batch, time of samples against their number."""
    rows = []

    def measure(name, what, value, function):
        times = in_turn({"": function}, options.rounds, options.device)[""]
        rows.append({"model": name, what: value, "ms": 1e3 * statistics.median(times),
                     "memory MB": peak_memory(function, options.device) / 1e6})
        show(rows)

    for name in options.models:
        for side in (64, 128, 256):
            measure(name, "side (step)", side, Bench(name, options, side=side).step)
        for batch in (1, 2, 4, 8):
            measure(name, "batch (step)", batch, Bench(name, options, batch=batch).step)
        b = Bench(name, options)
        b.model.eval()
        for n in (1, 4, 16, 64):
            measure(name, "samples", n, lambda: b.sample(n))
        if name == "ssn":
            for rank in (1, 5, 10, 20):
                measure(name, "rank (step)", rank, Bench(name, options, rank=rank).step)
    return rows


def table_of_evaluation(options) -> list[dict]:
    """A test split of synthetic scenes, 100 samples, every metric: where the time goes."""
    rows = []
    for name in options.models:
        bench = Bench(name, options, num_classes=4)
        first, test = data.load("shapes", ("train", "test"), n=5 * options.cases,
                                size=options.image_size)
        stream = data.batches(first.to(options.device), options.batch_size, seed=0)
        for _ in range(50):  # metrics cost more on the noise of an untrained model
            train.train_step(bench.model, bench.optimizer, *next(stream), 1e-3, bench.autocast())
        network = []  # seconds
        for method in ("sample", "predict", "log_likelihood", "reconstruct"):
            if hasattr(bench.model, method):
                setattr(bench.model, method, timed(getattr(bench.model, method), network))
        start = time.perf_counter()
        evaluate.score(bench.model, test.to(options.device), evaluate.SAMPLES)
        total = time.perf_counter() - start
        rows.append({"model": name, "images": len(test), "seconds": total,
                     "images/s": len(test) / total, "network": sum(network) / total,
                     "metrics": 1 - sum(network) / total})
        show(rows)
    return rows


def timed(function, seconds: list):
    """`function`, each of whose calls adds its seconds to the list."""
    def call(*args, **kwargs):
        start = time.perf_counter()
        out = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return out
    return call


TABLES = {"models": table_of_models, "costs": table_of_costs, "scaling": table_of_scaling,
          "evaluation": table_of_evaluation}


# ---------------------------------------------------------------------------- the command line


def show(rows: list[dict]) -> None:
    """The newest row of a table that Markdown understands, below a header where columns change."""
    def cell(value):
        if isinstance(value, tuple):
            return "{:.2f} ± {:.2f}".format(*value)
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value or "")

    if len(rows) == 1 or rows[-1].keys() != rows[-2].keys():
        print("| " + " | ".join(rows[-1]) + " |\n" + "|---" * len(rows[-1]) + "|")
    print("| " + " | ".join(map(cell, rows[-1].values())) + " |", flush=True)


def parse(argv=None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tables", nargs="+", choices=TABLES, default=["models"])
    p.add_argument("--models", nargs="+", metavar="NAME",
                   help=f"of {' '.join(models.MODELS)} (default: all but the ensemble, which is "
                   "many unet; evaluation and scaling: ssn)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    p.add_argument("--compile", action="store_true", help="torch.compile the step")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--image-size", type=int, default=128)
    p.add_argument("--samples", type=int, default=16, help="n of the models' table")
    p.add_argument("--cases", type=int, default=200, help="images of the evaluation's table")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--json", metavar="FILE", help="write everything measured to this file as well")
    return p.parse_args(argv)


def main(argv=None) -> int:
    """The command line; a user's mistake is one line on stderr and exit status 2."""
    options = parse(argv)
    try:
        options.device = pick_device(options.device)
        if min(options.batch_size, options.image_size, options.samples, options.cases,
               options.rounds) < 1:
            raise UserError("--batch-size, --image-size, --samples, --cases and --rounds are 1 or "
                            "more")
        if options.compile and (missing := train.lacks_compiler(options.device)):
            raise UserError(f"--compile: {missing}")
        for name in options.models or ():
            if name not in models.MODELS:
                raise UserError(f"--models {name}: choose from {', '.join(models.MODELS)}")
        train.keep_freed_memory()
        machine = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" \
            else f"{torch.get_num_threads()} threads"
        print(f"torch {torch.__version__}, {options.device} ({machine}), {options.precision}"
              f"{', compiled' * options.compile}, batch {options.batch_size}, "
              f"{options.image_size} x {options.image_size}, {options.rounds} rounds", flush=True)
        given, results = options.models, {}
        for name in options.tables:
            every = [m for m in models.MODELS if m != "ensemble"] if name == "models" else ["ssn"]
            options.models = given or every
            print(f"\n{name}: {TABLES[name].__doc__.splitlines()[0]}", flush=True)
            results[name] = TABLES[name](options)
        if options.json:
            write_text(options.json, json.dumps(results, indent=2) + "\n")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
