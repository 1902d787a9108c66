"""What two or more methods share: Gaussians, losses, convolutions, padding, devices.

All files write shapes with the same letters:
    B batch · C channels · K classes · *S spatial axes (H W, or D H W, or one) · n samples ·
    A annotators · R rank · N cases · m samples that are computed together
Equations keep the letters of their papers.
A "3-wide" convolution has a kernel of 3 pixels along every spatial axis.

Sections: noise and Gaussians / losses / convolutions / padding / initialisation / device /
progress.
"""

import ast
import json
import math
import os
import re
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255  # the label of pixels that every loss and metric leaves out


class UserError(ValueError):
    """A mistake of the user: the command line prints its one line without a traceback."""


def key_values(option: str, items: list[str]) -> dict:
    """["rank=0", "norm=batch"] -> {"rank": 0, "norm": "batch"}: Python literals, else text."""
    result = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or len(item) > 1000:
            raise UserError(f"{option} {item[:80]}: write key=value, up to 1000 characters")
        try:
            result[key] = ast.literal_eval(value)
            json.dumps(result[key], allow_nan=False)  # config.json has to store it
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            result[key] = value
    return result


# ------------------------------------------------------------------------ noise and Gaussians

# Samples are computed in chunks of about this many feature values (16 MB and 256 MB in float32). A
# CPU is fastest while a chunk stays in its cache; a GPU needs much work at once.
CHUNK_CPU, CHUNK_GPU = 2**22, 2**26


def samples_at_once(values: int, device: torch.device) -> int:
    """The number of samples in a chunk if one sample needs `values` feature values at its widest
    layer. Because of the chunks, sampling more masks does not take more memory for features."""
    chunk = CHUNK_CPU if device.type == "cpu" else CHUNK_GPU
    return max(1, chunk // values)


def concatenate(chunks, n: int) -> Tensor:
    """Join chunks of samples (m, ...), n samples in total, to one tensor (n, ...). Unlike torch.cat
    of a list, this does not hold every sample twice in memory."""
    samples, start = None, 0
    for chunk in chunks:
        if len(chunk) == n:
            return chunk
        if samples is None:
            samples = chunk.new_empty(n, *chunk.shape[1:])
        samples[start : start + len(chunk)] = chunk
        start += len(chunk)
    return samples


def bounded_log_std(x: Tensor) -> Tensor:
    """Squash x smoothly into (-4, 4), so that the std is between 0.018 and 55. float32.

    An unbounded log std is the most frequent cause of NaN in the KL of a conditional VAE. The bound
    is 4 so that training copes with images that were not standardised: on images times 255, the KL
    falls from 3e6 to 6 nats in 300 steps; with a bound of 10, from 1e11 only to 6e3.
    """
    return 4 * torch.tanh(x.float() / 4)


def standard_normal(shape, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal float32 noise of `shape`, by `draw_noise`."""
    return draw_noise(torch.randn, shape, like, generator)


def uniform(shape, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Float32 noise of `shape`, uniform on [0, 1), by `draw_noise`."""
    return draw_noise(torch.rand, shape, like, generator)


def draw_noise(draw, shape, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise of `shape`, whose first axis is the batch, on the device of `like`.

    With a generator, the noise is drawn on the generator's device and then moved, so a seed gives
    the same noise on every device. Without one, when training under DistributedDataParallel, all
    ranks have the same seed: each draws the noise of the whole global batch and keeps the rows of
    its own cases. Several processes then use exactly the noise that a single process would.
    """
    if generator is not None:
        return draw(shape, generator=generator, device=generator.device).to(like.device)
    shared = dist.is_initialized() and torch.is_grad_enabled()
    world, rank = (dist.get_world_size(), dist.get_rank()) if shared else (1, 0)
    noise = draw((world * shape[0], *shape[1:]), device=like.device)
    return noise[rank * shape[0] : (rank + 1) * shape[0]]


def process_mean(x: Tensor) -> Tensor:
    """The mean of x over the processes of a training under DistributedDataParallel; otherwise x.

    The gradient is that of this process's x, because DistributedDataParallel averages gradients.
    """
    if not (dist.is_initialized() and torch.is_grad_enabled()):
        return x
    mean = x.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size() + (x - x.detach())  # exactly the mean, on every process


def dropout(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Dropout on x (B, ...): each value is zero with probability p, else scaled by 1/(1 - p).

    F.dropout accepts no generator and would give all processes of a run the same masks.
    """
    return x.masked_fill(uniform(x.shape, x, generator) < p, 0) / (1 - p)


def hierarchy_noise(channels: dict[int, int], multiple: int, image: Tensor, n: int,
                    generator: torch.Generator | None, width: int):
    """Yield standard normal noise for n samples of a hierarchy of latent maps (PHiSeg, HPU-Net), in
    chunks of m samples: {level i: (m * B, D_i, *S_i)}, the B cases of a sample side by side. All of
    it is drawn before the first chunk, so that the samples do not depend on m.

    channels: {i: D_i}, coarse to fine; a level with D_i = 0 has no latents.
    multiple: side, in pixels, of one position of the coarsest map; it halves at every finer level.
    width: feature values that a sample needs for each pixel of the image; they determine m.
    """
    size = [(s + multiple - 1) // multiple for s in image.shape[2:]]  # rounded up
    noise = {}
    for i, count in channels.items():
        if count:
            shape = (len(image), n, count, *size)
            noise[i] = standard_normal(shape, image, generator).transpose(0, 1)
        size = [2 * s for s in size]
    m = samples_at_once(image[:, 0].numel() * width, image.device)
    for start in range(0, n, m):
        yield {i: e[start : start + m].flatten(0, 1) for i, e in noise.items()}


class DiagonalNormal:
    """Independent normals: prior and posterior of the latents in every conditional VAE here.

    mean, log_std: (B, ...) of the same shape, kept in float32; `log_std` is bounded first.
    """

    def __init__(self, mean: Tensor, log_std: Tensor):
        self.mean, self.log_std = mean.float(), bounded_log_std(log_std)
        self.std = self.log_std.exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One sample mean + std * noise, so gradients reach mean and std; shape of `mean`."""
        return self.mean + self.std * standard_normal(self.mean.shape, self.mean, generator)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of z in nats, summed over all axes but the batch: (B,)."""
        half_log_2pi = 0.9189385332046727
        scaled = (z.float() - self.mean) * torch.exp(-self.log_std)
        return -(0.5 * scaled.square() + self.log_std + half_log_2pi).flatten(1).sum(1)

    def kl(self, other: "DiagonalNormal") -> Tensor:
        """KL(self || other) in nats, summed over all axes but the batch: (B,)."""
        log_ratio = self.log_std - other.log_std
        scaled = (self.mean - other.mean) * torch.exp(-other.log_std)
        kl = 0.5 * (torch.exp(2 * log_ratio) + scaled.square() - 1) - log_ratio
        return kl.flatten(1).sum(1)


def predict_normal(head: nn.Module, features: Tensor) -> DiagonalNormal:
    """The normal that the 1-wide layer `head` predicts from features (B, C, ...): the first half of
    its channels is the mean, the second the log std. This runs in float32 even under autocast,
    because bfloat16 would round the mean to 8 bits and with it every sample."""
    with torch.autocast(features.device.type, enabled=False):
        return DiagonalNormal(*head(features.float()).chunk(2, 1))


def importance_log_ratio(log_q: Tensor, log_p: Tensor, n_q: int, n_p: int) -> Tensor:
    """log [p(z) / mix(z)], the correction in importance sampling of a conditional VAE's likelihood
    (Burda et al. 2016). The estimate of log p(y | x) from n latents z_i is

        log (1/n) sum_i p(y | z_i) p(z_i) / mix(z_i),     mix = (n_q q + n_p p) / n,

    where n_q of the z_i are drawn from the posterior q and n_p from the prior p. The methods draw
    half from each, because q may miss the right z for masks unlike those of training, and then the
    z_i from p help. The estimate is on average a lower bound: the ELBO for n = n_q = 1. For large
    n it approaches log p(y | x).

    log_q, log_p: log densities of the z_i in nats, of one shape, which is also the result's.
    """
    log_share_q = math.log(n_q / (n_q + n_p)) if n_q else -math.inf
    log_share_p = math.log(n_p / (n_q + n_p)) if n_p else -math.inf
    return log_p - torch.logaddexp(log_q + log_share_q, log_p + log_share_p)


class LowRankNormal:
    """N(mean, P P^T + diag(D)), a joint distribution of all logits of a map (SSN Eq. 5).

    mean (B, K, *S). factor P (B, R, K, *S), or None for independent logits. diagonal D
    (B, K, *S), variances > 0. With standard normal e1, e2, a sample is mean + P e1 + sqrt(D) e2.
    No matrix is factorised or inverted, so ill-conditioned covariances do no harm.
    """

    def __init__(self, mean: Tensor, factor: Tensor | None, diagonal: Tensor):
        self.mean, self.diagonal = mean.float(), diagonal.float()
        self.factor = None if factor is None else factor.float()

    def sample(self, n: int, generator: torch.Generator | None = None, *,
               antithetic: bool = False, temperature: float = 1.0) -> Tensor:
        """n reparameterised samples, (n, B, K, *S) float32.

        antithetic: samples n/2 .. n-1 mirror samples 0 .. n/2-1 about the mean. Averages over
            them, such as a loss, vary less; but the samples are no longer independent.
        temperature: T scales the covariance, N(mean, T Sigma); at 0 every sample is the mean.
        """
        drawn = (n + 1) // 2 if antithetic else n
        batch, mean = len(self.mean), self.mean.unsqueeze(1)
        shape = (batch, drawn, *self.mean.shape[1:])
        e2 = standard_normal(shape, mean, generator)  # (B, n, K, *S)
        std = self.diagonal.sqrt().unsqueeze(1)
        # sqrt(D) e2; in place it saves memory, but the backward pass needs e2 unchanged
        deviation = e2 * std if torch.is_grad_enabled() else e2.mul_(std)
        if self.factor is not None:
            e1 = standard_normal((batch, drawn, self.factor.shape[1]), mean, generator)
            # adds P e1 in place, through a view; bfloat16 (autocast) would round every sample
            with torch.autocast(mean.device.type, enabled=False):
                deviation.view(batch, drawn, -1).baddbmm_(e1, self.factor.flatten(2))
        if temperature != 1:
            deviation *= temperature**0.5
        if antithetic:
            return torch.cat([mean + deviation, mean - deviation], 1)[:, :n].transpose(0, 1)
        return deviation.add_(mean).transpose(0, 1)

    def scale_classes(self, samples: Tensor, scale: Tensor) -> Tensor:
        """Scale the deviation from the mean of each class in finished samples (SSN Fig. 6).

        samples (n, B, K, *S); scale (K,): 1 leaves a class unchanged, 0 sets it to its mean,
        a negative value mirrors it about its mean.
        """
        scale = scale.to(samples).view(-1, *[1] * (samples.dim() - 3))
        return self.mean + scale * (samples - self.mean)


# ------------------------------------------------------------------------------------- losses


def valid_label(label: Tensor, mask: Tensor | None) -> Tensor:
    """`label` (B, *S) with 255, to be ignored, wherever `mask` (B, *S) is given and False."""
    return label if mask is None else label.masked_fill(~mask, IGNORE)


def one_hot(label: Tensor, num_classes: int, size) -> Tensor:
    """Label map (B, *S) -> one-hot float32 (B, K, *size), centred as `pad_to_multiple` centres the
    image. Padding and ignored pixels (255) are zero in every class."""
    classes = torch.arange(num_classes, device=label.device).view(-1, *[1] * len(size))
    hot = torch.zeros(len(label), num_classes, *size, device=label.device)
    center_crop(hot, label.shape[1:]).copy_(label.unsqueeze(1) == classes)
    return hot


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """-sum_i log softmax(logits_i)[label_i], summed over a case's pixels i, in nats: (..., B).

    logits (..., B, K, *S); label int64 (B, *S), 255 ignored, is the same for all leading axes.
    """
    lead = logits.dim() - label.dim() - 1  # number of leading axes
    label = label.expand(*logits.shape[:lead], *label.shape)
    pixels = F.cross_entropy(logits.float().flatten(0, lead), label.flatten(0, lead),
                             ignore_index=IGNORE, reduction="none")
    return pixels.flatten(1).sum(1).view(label.shape[: lead + 1])


# ------------------------------------------------------------------------------- convolutions

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def batch_norm(dims: int, channels: int) -> nn.Module:
    """Batch norm with the epsilon of PHiSeg's and SSN's code, 1e-3, but PyTorch's momentum, 0.1.

    Their running statistics move by 1 % a step, so in runs of hundreds of steps they lag behind the
    weights: a small PHiSeg had a GED of .286 with them, .16 to .18 with re-estimated statistics.
    """
    return BATCH_NORM[dims](channels, eps=1e-3)


def conv_block(dims: int, in_channels: int, out_channels: int, *, convs: int = 1,
               kernel: int = 3, norm: str = "batch") -> nn.Sequential:
    """`convs` times: a convolution that keeps the size, normalisation ("batch" or "none"), ReLU."""
    if convs < 1:
        raise ValueError(f"convs={convs}: a block has at least 1 convolution")
    layers = []
    for i in range(convs):
        # batch norm subtracts the mean, so a bias before it would have no effect
        layers.append(CONV[dims](in_channels if i == 0 else out_channels, out_channels, kernel,
                                 padding=kernel // 2, bias=norm != "batch"))
        if norm == "batch":
            layers.append(batch_norm(dims, out_channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def run_encoder(blocks, x: Tensor) -> list[Tensor]:
    """Apply `blocks`, with `downsample` in between; returns all features, fine to coarse."""
    features = []
    for block in blocks:
        x = block(downsample(x) if features else x)
        features.append(x)
    return features


def downsample(x: Tensor) -> Tensor:
    """Halve the size by average pooling; for even sizes this equals bilinear down-sampling."""
    return AVERAGE_POOL[x.dim() - 2](x, 2)


def upsample(x: Tensor) -> Tensor:
    """Double the size of x (B, C, *S) by linear interpolation."""
    return F.interpolate(x, scale_factor=2, mode=LINEAR[x.dim() - 2], align_corners=False)


# ------------------------------------------------------------------------------------ padding


def reflect_pad(x: Tensor, pads: list[tuple[int, int]]) -> Tensor:
    """Pad the last len(pads) axes by reflection, with (before, after) pixels each.

    The edge pixel is not repeated. F.pad(mode="reflect") can only pad by less than the size.
    """
    for axis, (before, after) in zip(range(-len(pads), 0), pads):
        if before or after:
            index = torch.arange(-before, x.shape[axis] + after, device=x.device)
            x = x.index_select(axis, reflect_index(index, x.shape[axis]))
    return x


def reflect_index(index: Tensor, size: int) -> Tensor:
    """Map integers to 0 .. size - 1 by reflection at both edges: -1 -> 1, size -> size - 2."""
    period = max(2 * (size - 1), 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, *S) by reflection, evenly on both sides, until `multiple` divides every side.

    `center_crop(pad_to_multiple(x, m), x.shape[2:])` is x.
    """
    extra = [-size % multiple for size in x.shape[2:]]
    return reflect_pad(x, [(e // 2, e - e // 2) for e in extra])


def center_crop(x: Tensor, size) -> Tensor:
    """The central window of `size` (one entry for each trailing axis), as a view."""
    for axis, length in zip(range(-len(size), 0), size):
        x = x.narrow(axis, (x.shape[axis] - length) // 2, length)
    return x


# ---------------------------------------------------------------- initialisation, checks, demos


def init_orthogonal(module: nn.Module) -> None:
    """(Hierarchical) Probabilistic U-Net's initial weights: orthogonal; biases of std 0.001."""
    for m in module.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            nn.init.orthogonal_(m.weight)
            if m.bias is not None:
                nn.init.trunc_normal_(m.bias, std=1e-3, a=-2e-3, b=2e-3)


def init_he(module: nn.Module) -> None:
    """Initial weights of PHiSeg's code and SSN's U-Net (He et al. 2015): normal, with a std that
    keeps the size of activations constant from one ReLU layer to the next; zero biases."""
    for m in module.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def check_choice(name: str, value, allowed) -> None:
    """Raise a ValueError that lists the allowed values, unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")


def train_small(model: nn.Module, batches, steps: int, lr: float, drop_at: int) -> None:
    """Train a demo's small model with Adam, at `lr` and from step `drop_at` on at lr / 4.

    batches: an iterator over (image, label). The model is in eval mode afterwards.
    """
    optimizer, progress = torch.optim.Adam(model.parameters(), lr=lr), Progress(steps)
    for step, (image, label) in zip(range(steps), batches):
        optimizer.param_groups[0]["lr"] = lr if step < drop_at else lr / 4
        optimizer.zero_grad()
        loss, terms = model(image, label)
        loss.backward()
        optimizer.step()
        note = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
        progress.update(step + 1, note, line=step % 100 == 99)
    model.eval()


# ------------------------------------------------------------------------------------- device


def pick_device(name: str = "auto") -> torch.device:
    """Device "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N"; else a UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name):
        raise UserError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # with its index, as in tensor.device
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: PyTorch can see {torch.cuda.device_count()} CUDA "
                            "devices; use --device cpu, or install a CUDA build")
    return device


def set_tf32(allowed: bool) -> None:
    """Let a GPU round the inputs of float32 products and convolutions to 10 bits, or not. By
    default, PyTorch does so for convolutions."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def start_processes(device_name: str) -> tuple[torch.device, int, int]:
    """Returns (device, rank, world size). A process started by torchrun joins its group."""
    set_tf32(False)
    device = pick_device(device_name)
    if "WORLD_SIZE" not in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # CUDA graphs are recorded on the current device
        return device, 0, 1
    try:
        world, rank, local = (int(os.environ[k]) for k in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    except (KeyError, ValueError):
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment, but RANK and "
                        "LOCAL_RANK have to be set, too, and all must be whole numbers: "
                        "start with torchrun, or unset it") from None
    if device.type == "cuda":
        device = pick_device(f"cuda:{local}")
        torch.cuda.set_device(device)
    # long, because the other ranks wait while rank 0 makes the report's pictures
    own = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
    dist.init_process_group(timeout=timedelta(hours=24), **own)
    return device, rank, world


OUT_OF_MEMORY = "out of memory", "allocate memory", "not enough memory"  # in torch's messages


def out_of_memory(error: BaseException) -> bool:
    """Whether this error says that the memory of the GPU or of the machine does not suffice."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


# ------------------------------------------------------------------------------------ progress


def is_first() -> bool:
    """Whether this process writes and prints: it is the only one, or the first of torchrun's."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def say(text: str, end: str = "\n") -> None:
    """Print `text`, in the first process. A stdout that is closed, full or cannot encode it does
    not stop the run."""
    if not is_first():
        return
    try:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), end=end, flush=True)
    except (AttributeError, OSError, ValueError):
        sys.stdout = None


class Progress:
    """Shows progress, in the first process: one updating line on a terminal, lines in a pipe."""

    def __init__(self, total: int, done: int = 0):
        self.total, self.first = total, done
        self.terminal = bool(sys.stdout and not sys.stdout.closed and sys.stdout.isatty())
        self.start, self.shown, self.note = time.monotonic(), 0.0, ""

    def update(self, done: int, note: str | None = None, line: bool = False) -> None:
        """Show that `done` steps are done. note: text beside the count; line: print in any case."""
        self.note = self.note if note is None else note
        now = time.monotonic()
        if not (line or (self.terminal and now - self.shown > 0.1)):
            return
        self.shown = now
        text = f"{done}/{self.total}"
        if (rate := (done - self.first) / max(now - self.start, 1e-9)) > 0:
            speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
            text += f"  {speed}  {timedelta(seconds=int((self.total - done) / rate))} left"
        self.say(f"{text}  {self.note}", end="" if self.terminal else "\n")

    def say(self, text: str, end: str = "\n") -> None:
        """Print `text` in place of the progress line."""
        say(f"\r\x1b[K{text}" if self.terminal else text, end)
