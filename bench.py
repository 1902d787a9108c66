"""Speed and memory of every model, as ratios measured in one run.

    python bench.py                                       # every model: batch 4, 128 x 128
    python bench.py --device cuda --tables gpu            # the first thing to run on a new GPU
    python bench.py --device cuda --precision bf16 --compile --batch-size 32
    python bench.py --models ssn phiseg --rounds 9 --json bench.json
    python bench.py --tables costs                        # what a method adds to its U-Net
    python bench.py --tables evaluation                   # where the time of evaluate.py goes

Milliseconds differ between machines and from minute to minute; ratios hardly do. So everything
that is compared runs in turn, A B A B ..., for some rounds. A time is the median over the rounds. A
ratio is the median of the rounds' own ratios, +- half the distance of their quartiles. Models have
their default configuration, the papers' for LIDC.

Columns of the table `models`:
    GFLOP        arithmetic of one training step, by torch's counter
    step         one training step as train.py does it: loss of a batch, gradients, optimiser
    / plain      step, relative to the same without what train.py and the options do for speed: in
                 float32, not compiled, memory layout and optimiser as PyTorch has them
    / convs      step, relative to running only its convolutions, forward and backward. What is
                 above 1 goes into norms, activations, upsampling, loss and optimiser
    predict      the deterministic answer for one image
    1 sample     one sample of one image; 16 samples: as a multiple of one sample's time
    memory       on a GPU: the most that a step allocates, beyond model and optimiser

The table `gpu` compares a step in bfloat16, also as CUDA graphs or (`--compile`, a minute a model)
compiled, with one in float32. It also says which share of the card's speed, measured by one large
matrix product, the step with CUDA graphs reaches.
Below a tenth, the time goes into starting kernels and moving memory: try a larger --batch-size.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import models
import train
from common import UserError, cross_entropy, pick_device, set_tf32
from sources.files import write_text

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.linear)


# ------------------------------------------------------------------------------------ measuring


def clock() -> float:
    """The time in seconds, once the GPU has done what was started."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function) -> float:
    """Seconds that a call of the function takes, with the GPU work that it starts."""
    start = clock()
    function()
    return clock() - start


def in_turn(functions: dict, rounds: int) -> dict:
    """Seconds of every function in every round, {name: [rounds]}, run in turn after a warm-up."""
    warm_up = 2
    times = {name: [] for name in functions}
    for _ in range(warm_up + rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: each[warm_up:] for name, each in times.items()}


def milliseconds(times: list) -> float:
    """The median of the rounds' seconds, in milliseconds."""
    return 1e3 * statistics.median(times)


def ratio(a: list, b: list) -> tuple[float, float]:
    """Median of the rounds' a / b, and half the distance of their quartiles."""
    each = sorted(x / y for x, y in zip(a, b))
    quarter = len(each) // 4
    return statistics.median(each), (each[-1 - quarter] - each[quarter]) / 2


def memory_of_step(bench) -> int:
    """Bytes on the GPU that a training step needs at its worst, beyond model and optimiser. Not of
    recorded graphs, whose memory is allocated before."""
    device = bench.image.device
    bench.model.train()
    bench.optimizer.zero_grad()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    bench.step()
    return torch.cuda.max_memory_allocated(device) - before


def operations(function) -> int:
    """Floating-point operations of a call by torch's counter, which counts a multiplication and an
    addition as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Convolutions(TorchFunctionMode):
    """A context that notes every convolution and linear layer that runs in it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in CONVOLUTIONS:
            self.calls.append((function, args, kwargs or {}, out))
        return out


def convolutions_alone(function, backward: bool, autocast=contextlib.nullcontext):
    """Return a function that runs only the convolutions and linear layers of `function`, one after
    the other, on tensors of the same shape and layout, with their gradients if `backward`."""
    with Convolutions() as noted:
        function()
    calls = []
    for convolution, args, options, out in noted.calls:
        inputs = [torch.randn_like(x).requires_grad_(x.requires_grad)
                  if isinstance(x, torch.Tensor) else x for x in args]
        wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad
                  and out.requires_grad]  # none of a pass under no_grad
        calls.append((convolution, inputs, options, wanted, torch.randn_like(out)))

    def run():
        with autocast():
            for convolution, inputs, options, wanted, gradient in calls:
                with torch.set_grad_enabled(backward and bool(wanted)):
                    out = convolution(*inputs, **options)
                if backward and wanted:
                    torch.autograd.grad(out, wanted, gradient)

    return run


# ---------------------------------------------------------------------------------- the tables


class Bench:
    """A model with inputs, and the functions to be timed."""

    def __init__(self, name: str, options, *, plain=False, num_classes=2):
        self.name, device, side = name, options.device, options.image_size
        torch.manual_seed(0)
        model = models.build(name, dict(num_classes=num_classes))
        self.model = model.to(device) if plain else models.place(model, device)
        self.image = torch.randn(options.batch_size, 1, side, side, device=device)
        self.label = torch.randint(num_classes, (options.batch_size, side, side), device=device)
        self.bf16 = options.precision == "bf16" and not plain
        self.graphs = options.cuda_graphs and not plain
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=None if plain else True)
        self.loss = models.compiled(self.model) if options.compile and not plain else self.model
        if self.graphs:
            self.loss = train.Recorded(self.model, self.image, self.label, self.autocast())

    def autocast(self):
        """A context that computes in the precision asked for."""
        return torch.autocast(self.image.device.type, torch.bfloat16, enabled=self.bf16,
                              cache_enabled=not self.graphs)

    def step(self):
        """One training step."""
        train.train_step(self.loss, self.optimizer, self.image, self.label, 1e-6, self.autocast())

    def call(self, method: str, *arguments):
        """A method of the model, in the precision asked for."""
        with self.autocast():
            return getattr(self.model, method)(*arguments)


def table_of_models(options) -> list[dict]:
    """A row a model: training step, samples, memory."""
    rows = []
    for name in options.models:
        b, plain = Bench(name, options), Bench(name, options, plain=True)
        loss, first = functools.partial(b.call, "loss", b.image, b.label), b.image[:1]
        times = in_turn({"step": b.step, "plain": plain.step,
                         "convs": convolutions_alone(loss, True, b.autocast)}, options.rounds)
        b.model.eval()
        drawn = in_turn({"one": lambda: b.call("sample", first, 1),
                         "n": lambda: b.call("sample", first, options.samples),
                         "predict": lambda: b.call("predict", first)}, options.rounds)
        row = {"model": name, "parameters": sum(p.numel() for p in b.model.parameters()),
               "GFLOP": operations(plain.step) / 1e9, "step ms": milliseconds(times["step"]),
               "/ plain": ratio(times["step"], times["plain"]),
               "/ convs": ratio(times["step"], times["convs"]),
               "predict ms": milliseconds(drawn["predict"]),
               "1 sample ms": milliseconds(drawn["one"]),
               f"{options.samples} samples": ratio(drawn["n"], drawn["one"])}
        if options.device.type == "cuda" and not b.graphs:
            row["memory MB"] = memory_of_step(b) / 1e6
        rows.append(row)
        show(rows)
    return rows


def table_of_costs(options) -> list[dict]:
    """What a method adds to its own U-Net, or to the convolutions of its samples."""
    rows = []

    def add(what, numerator, denominator):
        rows.append({"what": what, "ratio": ratio(numerator, denominator),
                     "ms": milliseconds(numerator)})
        show(rows)

    ssn, unet = Bench("ssn", options), Bench("ssn", options)
    network = nn.Sequential(unet.model.backbone, unet.model.mean)  # SSN without its distribution
    unet.loss = lambda image, label: (cross_entropy(network(image), label).mean(), {})
    unet.optimizer = torch.optim.Adam(network.parameters(), fused=True)
    times = in_turn({"ssn": ssn.step, "unet": unet.step}, options.rounds)
    add("ssn: step with 20 samples / cross-entropy step", times["ssn"], times["unet"])

    prob_unet = Bench("prob_unet", options)
    head = list(prob_unet.model.comb)[-1]  # a 1 x 1 convolution to the classes
    for bench, network in ((ssn, network), (prob_unet, nn.Sequential(prob_unet.model.unet, head))):
        bench.model.eval()
        network.eval()
        with torch.no_grad(), bench.autocast():
            times = in_turn({"samples": lambda: bench.call("sample", bench.image[:1], 100),
                             "unet": lambda: network(bench.image[:1])}, options.rounds)
        add(f"{bench.name}: 100 samples / one U-Net pass", times["samples"], times["unet"])

    for name in ("phiseg", "hpunet", "vae_unet"):
        bench = Bench(name, options)
        bench.model.eval()
        functions = {}
        for n in (1, 17):
            functions[n] = functools.partial(bench.call, "sample", bench.image[:1], n)
            functions["convs", n] = convolutions_alone(functions[n], False, bench.autocast)
        times = in_turn(functions, options.rounds)
        samples = [many - one for one, many in zip(times[1], times[17])]
        convs = [many - one for one, many in zip(times["convs", 1], times["convs", 17])]
        add(f"{name}: 16 more samples / their convolutions alone", samples, convs)
    return rows


def table_of_gpu(options) -> list[dict]:
    """A step in bfloat16, as CUDA graphs or compiled, against one in float32; the card's rate."""
    if options.device.type != "cuda":
        raise UserError("--tables gpu: give --device cuda")
    a, b = torch.randn(2, 8192, 8192, device=options.device, dtype=torch.bfloat16)
    times = in_turn({"product": lambda: a @ b}, 9)["product"]
    rows, rate = [], 2 * 8192**3 / statistics.median(times)  # operations a second
    print(f"a product of bfloat16 matrices: {rate / 1e12:.0f} TFLOP/s")
    for name in options.models:
        kinds = {"fp32": dict(precision="fp32"), "bf16": dict(),
                 "bf16 graphs": dict(cuda_graphs=True)}
        if options.compile:
            kinds["bf16 compiled"] = dict(compile=True)
        common = vars(options) | dict(precision="bf16", compile=False, cuda_graphs=False)
        benches = {kind: Bench(name, argparse.Namespace(**common | given))
                   for kind, given in kinds.items()}
        times = in_turn({kind: b.step for kind, b in benches.items()}, options.rounds)
        plain = benches["fp32"]
        share = operations(plain.step) / statistics.median(times["bf16 graphs"]) / rate
        rows.append({"model": name, "fp32 ms": milliseconds(times["fp32"]),
                     **{f"{kind} / fp32": ratio(times[kind], times["fp32"])
                        for kind in kinds if kind != "fp32"},
                     "of the matrix rate": share,
                     **{f"{kind} memory MB": memory_of_step(benches[kind]) / 1e6
                        for kind in ("fp32", "bf16")}})
        show(rows)
        del plain, benches  # and the memory that recorded graphs hold
    return rows


def table_of_evaluation(options) -> list[dict]:
    """A test split of synthetic scenes, 100 samples, every measure: milliseconds a case."""
    rows = []
    for name in options.models:
        bench = Bench(name, options, num_classes=4)
        first, test = data.load("shapes", ("train", "test"), n=5 * options.cases,
                                size=options.image_size)
        stream = data.batches(first.to(options.device), options.batch_size, seed=0)
        for _ in range(50):  # measures cost more on the noise of an untrained model
            train.train_step(bench.model, bench.optimizer, *next(stream), 1e-3, bench.autocast())
        methods = ("sample", "predict", "log_likelihood", "reconstruct")
        times = {method: [] for method in methods if hasattr(bench.model, method)}  # seconds
        for method in times:
            setattr(bench.model, method, timed(getattr(bench.model, method), times[method]))
        few = dataclasses.replace(test, labels=test.labels[:, :4], weights=None, exact=False)
        if options.device.type == "cuda":  # a first evaluation loads kernels and takes memory
            evaluate.score(bench.model, few.subset(range(min(len(few), 40))).to(options.device),
                           evaluate.SAMPLES)
        for split in (few, test):
            for method in times:
                times[method].clear()
            total = seconds(lambda: evaluate.score(bench.model, split.to(options.device),
                                                   evaluate.SAMPLES))
            network = {method: sum(each) for method, each in times.items()}
            measures = total - sum(network.values())
            each = {**network, "measures": measures, "all": total}
            rows.append({"model": name, "annotators": split.labels.shape[1], "images": len(split),
                         **{f"{what} ms": 1e3 * time / len(split) for what, time in each.items()},
                         "measures / network": measures / sum(network.values())})
            show(rows)
    return rows


def timed(function, times: list):
    """Return the function such that each call appends its seconds to the list."""
    def call(*args, **kwargs):
        start = clock()
        out = function(*args, **kwargs)
        times.append(clock() - start)
        return out
    return call


TABLES = {"models": table_of_models, "costs": table_of_costs, "evaluation": table_of_evaluation,
          "gpu": table_of_gpu}


# ---------------------------------------------------------------------------- the command line


def show(rows: list[dict]) -> None:
    """Print the newest row of a table in Markdown, and above the first one its header."""
    def cell(value):
        if isinstance(value, tuple):
            return "{:.2f} ± {:.2f}".format(*value)
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else value

    if len(rows) == 1:
        print("| " + " | ".join(rows[-1]) + " |\n" + "|---" * len(rows[-1]) + "|")
    print("| " + " | ".join(map(cell, rows[-1].values())) + " |", flush=True)


def parse(argv=None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tables", nargs="+", choices=TABLES, default=["models"])
    p.add_argument("--models", nargs="+", metavar="NAME",
                   help=f"some of: {' '.join(models.MODELS)} (default: all but the ensemble, which "
                   "is several U-Nets; for the table evaluation: ssn)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
                   help="of a step (default fp32); `/ plain` is relative to float32, or to tf32 "
                   "if that is given, because it holds for the whole process")
    p.add_argument("--compile", action="store_true", help="torch.compile the step")
    p.add_argument("--cuda-graphs", action="store_true", help="as train.py --cuda-graphs")
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
        for name in ("batch_size", "image_size", "samples", "cases", "rounds"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}: give 1 or more")
        if options.compile and (missing := models.lacks_compiler(options.device)):
            raise UserError(f"--compile: {missing}")
        if options.compile and options.cuda_graphs:
            raise UserError("--compile and --cuda-graphs: give one of them")
        if options.cuda_graphs and options.device.type != "cuda":
            raise UserError("--cuda-graphs: for a CUDA device, give --device cuda")
        train.keep_freed_memory()
        set_tf32(options.precision == "tf32")
        machine = f"{torch.get_num_threads()} threads"
        if options.device.type == "cuda":
            torch.cuda.set_device(options.device)
            machine = torch.cuda.get_device_name(options.device)
        print(f"torch {torch.__version__}, {options.device} ({machine}), {options.precision}"
              f"{', compiled' * options.compile}, batch {options.batch_size}, "
              f"{options.image_size} x {options.image_size}, {options.rounds} rounds", flush=True)
        given, results = options.models, {}
        for name in options.tables:
            every = [m for m in models.MODELS if m != "ensemble"]
            options.models = given or (["ssn"] if name == "evaluation" else every)
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
