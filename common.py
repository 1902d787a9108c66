"""What two or more methods share to the letter. Knows no method, no data set, no metric.

Alphabet of shapes, used in every file:
    B batch · C channels · K classes · *S spatial axes (H W, or D H W, or one) · n samples ·
    A annotators · R rank · N cases

Sections: noise and Gaussians / losses / U-Net / padding / initialisation / device / progress.
"""

import ast
import json
import math
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255  # label of a pixel that no loss and no metric sees


class UserError(ValueError):
    """A mistake of the user's, worth one line at the command line and no traceback."""


def key_values(option: str, items: list[str]) -> dict:
    """["rank=0", "channels=(8,16)"] -> {"rank": 0, "channels": (8, 16)}; other values are text."""
    result = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or len(item) > 1000:
            raise UserError(f"{option} {item[:80]}: write key=value, up to 1000 characters")
        try:
            result[key] = ast.literal_eval(value)
            json.dumps(result[key], allow_nan=False)  # as config.json will keep it
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            result[key] = value
    return result


# ------------------------------------------------------------------------ noise and Gaussians

# Feature values to compute together. A CPU is fastest while they stay in its cache; a GPU wants
# large launches, and these are small beside its memory (16 MB and 256 MB in float32).
CHUNK_CPU, CHUNK_GPU = 2**22, 2**26


def samples_at_once(values: int, device: torch.device) -> int:
    """How many samples to compute together, where each holds `values` feature values at its widest
    point, so that the memory that sampling takes does not grow with the number of samples."""
    return max(1, (CHUNK_CPU if device.type == "cpu" else CHUNK_GPU) // values)


def concatenate(chunks, n: int) -> Tensor:
    """Chunks of samples (m, ...), n samples in all, as one tensor (n, ...). Unlike torch.cat of a
    list, this does not hold them twice."""
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
    """Smoothly into (-4, 4), a std of 0.018 to 55; close to the identity in between. float32.

    An unbounded log std is the most frequent cause of a NaN in the KL of a conditional VAE. Images
    that were not standardised (x 255) begin with a KL of 1e11 nats under a bound of 10 and still
    have 6e3 after 300 steps; under 4, these are 3e6 and 6.
    """
    return 4 * torch.tanh(x.float() / 4)


def standard_normal(shape, like: Tensor, generator: torch.Generator | None = None, *,
                    draw=torch.randn) -> Tensor:
    """Float32 noise of `shape`, whose first axis is the batch, on the device of `like`.

    With a generator, on the generator's device first, so one seed gives one result everywhere.
    Without one, in training under DistributedDataParallel every rank (all seeded alike) draws for
    the whole global batch and keeps its own rows: W processes see exactly the noise one would.
    """
    if generator is not None:
        return draw(shape, generator=generator, device=generator.device).to(like.device)
    shared = dist.is_initialized() and torch.is_grad_enabled()
    world, rank = (dist.get_world_size(), dist.get_rank()) if shared else (1, 0)
    noise = draw((world * shape[0], *shape[1:]), device=like.device)
    return noise[rank * shape[0] : (rank + 1) * shape[0]]


def uniform(shape, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """As `standard_normal`, but uniform on [0, 1)."""
    return standard_normal(shape, like, generator, draw=torch.rand)


def dropout(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """x (B, ...) with a share p of zeros and the rest scaled by 1/(1 - p).

    F.dropout takes no generator, and would give every process of a run the same masks.
    """
    return x.masked_fill(uniform(x.shape, x, generator) < p, 0) / (1 - p)


def hierarchy_noise(channels: dict[int, int], multiple: int, image: Tensor, n: int,
                    generator: torch.Generator | None, width: int):
    """Yield standard normal noise for n draws of a hierarchy of latent maps, m draws at a time:
    {i: (m * B, D_i, *S_i)}, the cases of a draw together.

    channels: D_i of every level, coarse to fine; the coarsest has one position for `multiple`
        pixels a side, each next one has twice as many. A level of 0 channels has no noise.
    width: feature values that a draw holds for each pixel of the image, which decide about m.
    """
    size, noise = [-(-s // multiple) for s in image.shape[2:]], {}  # rounded up
    for i, depth in channels.items():
        if depth:
            shape = (len(image), n, depth, *size)
            noise[i] = standard_normal(shape, image, generator).transpose(0, 1)
        size = [2 * s for s in size]
    m = samples_at_once(image[:, 0].numel() * width, image.device)
    for start in range(0, n, m):
        yield {i: e[start : start + m].flatten(0, 1) for i, e in noise.items()}


class DiagonalNormal:
    """Independent normals, the latent distribution of every conditional VAE here.

    mean, log_std: (B, ...) of one shape; `log_std` is bounded on the way in, all in float32.
    """

    def __init__(self, mean: Tensor, log_std: Tensor):
        self.mean, self.log_std = mean.float(), bounded_log_std(log_std)
        self.std = self.log_std.exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One reparameterised draw, differentiable in mean and log_std; shape of `mean`."""
        return self.mean + self.std * standard_normal(self.mean.shape, self.mean, generator)

    def log_prob(self, z: Tensor) -> Tensor:
        """log density of z in nats, summed over all but the batch: (B,)."""
        half_log_2pi = 0.9189385332046727
        scaled = (z.float() - self.mean) * torch.exp(-self.log_std)
        return -(0.5 * scaled.square() + self.log_std + half_log_2pi).flatten(1).sum(1)

    def kl(self, other: "DiagonalNormal") -> Tensor:
        """KL(self || other) in nats, summed over all but the batch: (B,)."""
        log_ratio = self.log_std - other.log_std
        scaled = (self.mean - other.mean) * torch.exp(-other.log_std)
        kl = 0.5 * (torch.exp(2 * log_ratio) + scaled.square() - 1) - log_ratio
        return kl.flatten(1).sum(1)


def predict_normal(head: nn.Module, features: Tensor) -> DiagonalNormal:
    """The normal whose mean and log std (half of the channels each) the 1-wide layer `head`
    predicts from features (B, C, ...). In float32 whatever autocast says: bfloat16 would round the
    mean to 8 bits, and with it every sample."""
    with torch.autocast(features.device.type, enabled=False):
        return DiagonalNormal(*head(features.float()).chunk(2, 1))


def importance_log_ratio(log_q: Tensor, log_p: Tensor, n_q: int, n_p: int) -> Tensor:
    """log [p(z) / mix(z)] in the lower bound of a conditional VAE's log p(y | x) by importance
    sampling (Burda et al. 2016),

        log (1/n) sum_i p(y | z_i) p(z_i) / mix(z_i),     mix = (n_q q + n_p p) / n,

    where n_q of the n draws z_i are from the posterior q and n_p from the prior p. Every method
    takes half from each: q may be wrong about masks unlike those of training, and then the draws
    from p still count. n = n_q = 1 gives, on average, the ELBO; more draws tighten the bound.

    log_q, log_p: log densities of the z_i in nats, of one shape, as is the result.
    """
    log_share_q, log_share_p = (math.log(k / (n_q + n_p)) if k else -math.inf for k in (n_q, n_p))
    return log_p - torch.logaddexp(log_q + log_share_q, log_p + log_share_p)


class LowRankNormal:
    """N(mean, F F^T + diag(D)) over whole logit maps (SSN Eq. 5).

    mean (B, K, *S), factor F (B, R, K, *S) or None for independent normals, diagonal D
    (B, K, *S) of variances > 0. A draw is mean + F e1 + sqrt(D) e2: nothing is factored or
    inverted, so no covariance is too ill-conditioned to sample from.
    """

    def __init__(self, mean: Tensor, factor: Tensor | None, diagonal: Tensor):
        self.mean, self.diagonal = mean.float(), diagonal.float()
        self.factor = None if factor is None else factor.float()

    def sample(self, n: int, generator: torch.Generator | None = None, *,
               antithetic: bool = False, temperature: float = 1.0) -> Tensor:
        """n reparameterised draws, (n, B, K, *S) float32.

        antithetic: draws n/2 .. n-1 mirror draws 0 .. n/2-1 about the mean. An average over
            them varies less, but they are not independent: for a loss, not for a picture.
        temperature: T scales the covariance, N(mean, T Sigma); 0 returns the mean n times.
        """
        batch, drawn = len(self.mean), (n + 1) // 2 if antithetic else n
        shape, mean = (batch, drawn, *self.mean.shape[1:]), self.mean.unsqueeze(1)
        deviation = standard_normal(shape, mean, generator)  # (B, n, K, *S)
        std = self.diagonal.sqrt().unsqueeze(1)
        # In place from here on, so that samples take no more memory than they must; but gradients
        # need the noise itself.
        deviation = deviation * std if torch.is_grad_enabled() else deviation.mul_(std)
        if self.factor is not None:
            noise = standard_normal((batch, drawn, self.factor.shape[1]), mean, generator)
            # autocast would run the product in bfloat16 and round every sample
            with torch.autocast(mean.device.type, enabled=False):
                deviation.view(batch, drawn, -1).baddbmm_(noise, self.factor.flatten(2))
        if temperature != 1:
            deviation *= temperature**0.5
        if antithetic:
            return torch.cat([mean + deviation, mean - deviation], 1)[:, :n].transpose(0, 1)
        return deviation.add_(mean).transpose(0, 1)

    def scale_classes(self, samples: Tensor, scale: Tensor) -> Tensor:
        """Scale each class's part of (sample - mean) after the fact (SSN Fig. 6).

        samples (n, B, K, *S) as drawn; scale (K,): 1 keeps a class, 0 puts it at its mean,
        negative values turn its deviation round.
        """
        scale = scale.to(samples).view(-1, *[1] * (samples.dim() - 3))
        return self.mean + scale * (samples - self.mean)


# ------------------------------------------------------------------------------------- losses


def valid_label(label: Tensor, mask: Tensor | None) -> Tensor:
    """`label` (B, *S) with 255 wherever `mask` (B, *S) is given and false."""
    return label if mask is None else label.masked_fill(~mask, IGNORE)


def one_hot(label: Tensor, num_classes: int, size) -> Tensor:
    """Label map (B, *S) -> float32 (B, K, *size), as the posterior nets take it.

    Centred in `size` as `pad_to_multiple` centres an image; the padding and ignored pixels (255)
    are zero in every class.
    """
    classes = torch.arange(num_classes, device=label.device).view(-1, *[1] * len(size))
    hot = torch.zeros(len(label), num_classes, *size, device=label.device)
    center_crop(hot, label.shape[1:]).copy_(label.unsqueeze(1) == classes)
    return hot


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """-sum_i log softmax(logits_i)[label_i] over each case's pixels, in nats: (..., B) float32.

    logits (..., B, K, *S), label int64 (B, *S) with 255 ignored, shared by the leading axes.
    """
    lead = logits.dim() - label.dim() - 1  # number of leading axes
    label = label.expand(*logits.shape[:lead], *label.shape)
    pixels = F.cross_entropy(logits.float().flatten(0, lead), label.flatten(0, lead),
                             ignore_index=IGNORE, reduction="none")
    return pixels.flatten(1).sum(1).view(label.shape[: lead + 1])


# -------------------------------------------------------------------------------------- U-Net

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def batch_norm(dims: int, channels: int) -> nn.Module:
    """With the epsilon of PHiSeg's and SSN's code, 1e-3, and PyTorch's momentum, 0.1.

    Their averages move by 1 % a step and lag behind the weights in runs of hundreds of steps: a
    small PHiSeg had a GED of .286 with them, of .16 to .18 with statistics re-estimated.
    """
    return BATCH_NORM[dims](channels, eps=1e-3)


def conv_block(dims: int, in_channels: int, out_channels: int, *, convs: int = 1,
               kernel: int = 3, norm: str = "batch") -> nn.Sequential:
    """`convs` times: size-keeping convolution, normalisation ("batch" or "none"), ReLU."""
    layers = []
    for i in range(convs):
        # batch norm subtracts the mean again, so a bias before it would do nothing
        layers.append(CONV[dims](in_channels if i == 0 else out_channels, out_channels, kernel,
                                 padding=kernel // 2, bias=norm != "batch"))
        if norm == "batch":
            layers.append(batch_norm(dims, out_channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def encode(blocks, x: Tensor) -> list[Tensor]:
    """Features of every level of an encoder, fine to coarse: `blocks` with `halve` in between."""
    features = []
    for block in blocks:
        x = block(halve(x) if features else x)
        features.append(x)
    return features


def halve(x: Tensor) -> Tensor:
    """Average pooling, which all five papers use; for even sizes the same as bilinear halving."""
    return AVERAGE_POOL[x.dim() - 2](x, 2)


def double(x: Tensor) -> Tensor:
    """(B, C, *S) at twice the size, linearly interpolated."""
    return F.interpolate(x, scale_factor=2, mode=LINEAR[x.dim() - 2], align_corners=False)


class UNet(nn.Module):
    """U-Net body: image (B, in_channels, *S) -> features (B, out_channels, *S), any size.

    channels: one entry a resolution level, fine to coarse; each level is `convs` 3-wide
        convolutions, half the size of the one before.
    dims: spatial axes, 1 to 3.
    norm: "batch" (PHiSeg, SSN) or "none" (Probabilistic U-Net).
    wide: a level of the decoder has the width of the coarser level (SSN), not of its own.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], *, dims: int = 2,
                 convs: int = 3, norm: str = "batch", wide: bool = False):
        super().__init__()
        check_choice("norm", norm, ("batch", "none"))
        if not channels:
            raise ValueError("channels is empty: give one number for each resolution level")
        self.multiple = 2 ** (len(channels) - 1)
        self.encoder = nn.ModuleList(
            conv_block(dims, before, after, convs=convs, norm=norm)
            for before, after in zip((in_channels, *channels), channels))
        self.decoder = nn.ModuleList()  # coarse to fine
        width = channels[-1]
        for coarser, skip in zip(channels[:0:-1], channels[-2::-1]):
            after = coarser if wide else skip
            self.decoder.append(conv_block(dims, width + skip, after, convs=convs, norm=norm))
            width = after
        self.out_channels = width

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features of every level, fine to coarse; sizes must be multiples of `multiple`."""
        return encode(self.encoder, x)

    def decode(self, features: list[Tensor]) -> Tensor:
        """From the coarsest features to the finest, each level joined by its skip connection."""
        *skips, x = features
        for block in self.decoder:
            x = block(torch.cat([skips.pop(), double(x)], 1))
        return x

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        return center_crop(self.decode(self.encode(pad_to_multiple(x, self.multiple))), size)


# ------------------------------------------------------------------------------------ padding


def reflect_pad(x: Tensor, pads: list[tuple[int, int]]) -> Tensor:
    """Reflect the last len(pads) axes by (before, after) pixels, by more than their size too.

    The edge pixel is not repeated. (F.pad(mode="reflect") stops at the size less one.)
    """
    for axis, (before, after) in zip(range(-len(pads), 0), pads):
        if before or after:
            index = torch.arange(-before, x.shape[axis] + after, device=x.device)
            x = x.index_select(axis, reflect_index(index, x.shape[axis]))
    return x


def reflect_index(index: Tensor, size: int) -> Tensor:
    """Any integers into 0 .. size - 1 by reflection at both edges: -1 -> 1, size -> size - 2."""
    period = max(2 * (size - 1), 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """(B, C, *S) with every spatial size reflected up to the next multiple, evenly on both sides.

    `center_crop(pad_to_multiple(x, m), x.shape[2:])` is x.
    """
    extra = [-size % multiple for size in x.shape[2:]]
    return reflect_pad(x, [(e // 2, e - e // 2) for e in extra])


def center_crop(x: Tensor, size) -> Tensor:
    """The central window of `size` (one entry a trailing axis), a view."""
    for axis, length in zip(range(-len(size), 0), size):
        x = x.narrow(axis, (x.shape[axis] - length) // 2, length)
    return x


# ---------------------------------------------------------------- initialisation, checks, demos


def init_orthogonal(module: nn.Module) -> None:
    """The (Hierarchical) Probabilistic U-Net's start: orthogonal weights, biases of std 0.001."""
    for m in module.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            nn.init.orthogonal_(m.weight)
            if m.bias is not None:
                nn.init.trunc_normal_(m.bias, std=1e-3, a=-2e-3, b=2e-3)


def init_he(module: nn.Module) -> None:
    """The start of PHiSeg's code and SSN's U-Net: normal weights that keep the variance through a
    ReLU, biases zero (He et al. 2015)."""
    for m in module.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def check_choice(name: str, value, allowed) -> None:
    """ValueError naming the option, what was given and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")


def train_small(model: nn.Module, batches, steps: int, lr: float, drop_at: int) -> None:
    """What the methods' demos do: Adam at `lr`, from step `drop_at` on at a quarter of it.

    batches: an iterator over (image, label). The model is left in eval mode.
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
    """"auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N"; UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # refused like the others
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # what tensors there call it
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA "
                            "devices that PyTorch can see; use --device cpu, or install a CUDA "
                            "build")
    return device


def start_processes(device_name: str) -> tuple[torch.device, int, int]:
    """(device, rank, world size); joins the group when torchrun started this process."""
    device = pick_device(device_name)
    if "WORLD_SIZE" not in os.environ:
        return device, 0, 1
    try:
        world, rank, local = (int(os.environ[k]) for k in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    except (KeyError, ValueError):
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment, but not what "
                        "else torchrun sets: start with torchrun, or unset it") from None
    if device.type == "cuda":
        device = pick_device(f"cuda:{local}")
        torch.cuda.set_device(device)
    # the others wait while rank 0 draws, which may take long
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(hours=24))
    return device, rank, world


# ------------------------------------------------------------------------------------ progress


def say(text: str, end: str = "\n") -> None:
    """Print; a stdout that is closed, full or lacks a character never stops a run."""
    try:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), end=end, flush=True)
    except (AttributeError, OSError, ValueError):
        sys.stdout = None


class Progress:
    """One updating line on a terminal, plain lines in a pipe; silent on ranks above 0."""

    def __init__(self, total: int, done: int = 0, quiet: bool = False):
        self.total, self.first, self.quiet = total, done, quiet
        self.terminal = bool(sys.stdout and not sys.stdout.closed and sys.stdout.isatty())
        self.start, self.shown, self.note = time.monotonic(), 0.0, ""

    def update(self, done: int, note: str | None = None, line: bool = False) -> None:
        """note: what to say beside the count; line: print it in a pipe, or keep it on screen."""
        self.note = self.note if note is None else note
        now = time.monotonic()
        if self.quiet or not (line or (self.terminal and now - self.shown > 0.1)):
            return
        self.shown = now
        rate = max(done - self.first, 1e-9) / max(now - self.start, 1e-9)
        left = timedelta(seconds=int((self.total - done) / rate)) if done > self.first else "?"
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        self.say(f"{done}/{self.total}  {speed}  {left} left  {self.note}",
                 end="" if self.terminal else "\n")

    def say(self, text: str, end: str = "\n") -> None:
        """A line of its own, in place of the progress line."""
        if not self.quiet:
            say(f"\r\x1b[K{text}" if self.terminal else text, end)
