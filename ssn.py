"""Stochastic Segmentation Networks (Monteiro et al., NeurIPS 2020, arXiv:2006.06015).

One image, many plausible masks. An ordinary network predicts one logit map, and its softmax treats
the pixels as independent, so labels drawn from it are grainy noise. An SSN predicts a normal
distribution over the whole logit map eta, a vector of K logits for every pixel:
        eta | x ~ N(mu(x), P(x) P(x)^T + D(x)).                                        (Eq. 5)
A full covariance would be too large: 128 x 128 pixels and K = 2 have 32,768 logits, so 10^9
covariances. Therefore only a diagonal D and a part of low rank are predicted: P has R = 10 columns,
each of which is a map along which all logits vary together, so samples are coherent. Mean mu,
factor P and diagonal D are the outputs of three 1-wide convolutions (1x1 in 2D) on the features of
any network. It runs once for an image; a further sample costs only a matrix-vector product.

Training minimises the negative log-likelihood of a mask y, which is drawn anew from the image's
annotators whenever the image is used. p(y | x), the mean of prod_i softmax(eta_i)[y_i] over eta
(Eq. 1), where i are the pixels, has no closed form, so M = 20 samples eta^m estimate it (Eq. 6):
        -log p(y | x) ~= -logsumexp_m ( sum_i log softmax(eta_i^m)[y_i] ) + log M.     (Eq. 7)
Samples differ because of aleatoric uncertainty: the image alone does not determine the mask.

The paper's three experiments:
    LIDC   with a U-Net (the default configuration)
    BraTS  with DeepMedic (dims=3), trained on patches. At test time mean, factor and diagonal are
           stitched together first and then sampled, so samples show no patch borders.
    Fig. 2 with 21 pixels and no network: the three maps are free parameters (`train_toy`)
To put the method on a network of your own, call `SSN(config, backbone=net)`.

Differences from the paper
  1. A sample is mu + P e1 + sqrt(D) e2 with standard normal e1 and e2, as in the authors' code for
     LIDC and for the toy. Their code for BraTS uses torch's LowRankMultivariateNormal, which
     factorises a matrix; where that fails, their code takes independent normals instead. In
     training, half of the M samples mirror the other half about the mean, as in their code for
     BraTS; elsewhere they draw all of them independently.
  2. The log of the diagonal is bounded (common.bounded_log_std), so it cannot overflow. The authors
     stop the toy's training before it overflows.
  3. If the covariance outgrows the mean, training ends in bad optima (Sec. 5.1). As in the paper,
     the toy trains its mean first. In a known background (air around a brain), the paper removes
     the covariance and trains the mean alone; here such pixels have no loss at all. In addition,
     the covariance here starts small. With a large one, the background turns to foreground in whole
     samples. Eq. 7 barely notices, because the best of the M samples dominates it, so this takes
     long to unlearn (`shapes`, 300 steps: GED .37 with a large one, .23 with this one). Apart from
     that, the three convolutions start from PyTorch's initial weights; those of the code for LIDC
     start 2.5 times as large.
  4. The differences of the experiment with BraTS are listed in backbones/deepmedic.py.
  5. The temperature T scales the covariance, N(mu, T Sigma); the authors' scales the deviation.
  6. The U-Net's batch norm has the code's epsilon, 1e-3, but PyTorch's momentum, 0.1 instead of
     0.01, because slower averages lag behind the weights in runs of hundreds of steps
     (common.batch_norm).
  7. The U-Net's up-sampling is bilinear as in PyTorch; TensorFlow 1 places the samples half a pixel
     elsewhere.
  8. The toy's mean is first trained alone, with the plain cross-entropy: 200 steps of Adam at 0.4.
     Then all three maps take 2,500 steps by Eq. 7, at a rate that falls linearly from 0.4 to 0. The
     authors' toy takes 5,000 + 5,000 steps at 1e-3, both by Eq. 7. It has one logit per pixel; here
     there are two, and Fig. 2 shows their difference.
  9. LIDC is augmented as in the HPU-Net's paper (data.DATASETS), which is more than the authors do:
     they rotate half of the images by up to 10 degrees and magnify them.

    python ssn.py                                      # Fig. 2 in seconds -> ssn_toy.png
    python train.py --model ssn --data lidc --device cuda
    python train.py --model ssn --data lidc --model-args rank=0       # the diagonal model
    python train.py --model ssn --data brats --device cuda            # Table 2, with --model unet
    python evaluate.py runs/ssn-brats-0 --samples 20 --per-class
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from backbones.deepmedic import DeepMedic, DeepMedicConfig
from backbones.unet import DetUNet
from common import (CONV, LowRankNormal, bounded_log_std, check_choice, cross_entropy,
                    samples_at_once, valid_label)


@dataclass(frozen=True)
class SSNConfig:
    """Defaults are the paper's LIDC model."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    rank: int = 10  # R, columns of P; 0: none, the paper's diagonal model (GED .622, not .225)
    mc_samples: int = 20  # M of Eq. 7, in training
    diagonal_min: float = 1e-5  # added to every variance
    backbone: str = "auto"  # "unet" or "deepmedic"; auto: deepmedic if dims=3, else unet
    channels: tuple[int, ...] = (32, 64, 128, 192, 192, 192, 192)  # U-Net: width of each level
    convs: int = 3  # U-Net: 3-wide convolutions per level, and 1-wide ones at its end
    deepmedic: dict = field(default_factory=dict)  # fields of DeepMedicConfig to change


class SSN(nn.Module):
    """A backbone and three 1-wide convolutions that predict the normal distribution of Eq. 5.

    `loss`, which is also `forward`, draws M logit maps and returns Eq. 7. `sample` draws logit maps
    for you, `predict` uses the mean, and `distribution` returns the distribution itself.

    backbone: a network of your own, image (B, in_channels, *S) -> features (B, F, *S), with F in
        its attribute `out_channels`; None builds the one that `config` names.
    Default: 2D U-Net, 10.32 M parameters.
    """

    Config = SSNConfig
    TRAINING = dict(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=12, steps=500_000)
    QUICK_CONFIG = dict(channels=(16, 32, 64, 64, 64), convs=2, mc_samples=10,
                        deepmedic=DeepMedic.QUICK)
    QUICK_TRAINING = dict(lr=5e-3, lr_drops=((300, 0.4), (480, 0.08)), batch_size=8, steps=600)

    def __init__(self, config: SSNConfig = SSNConfig(), backbone: nn.Module | None = None):
        super().__init__()
        self.config = c = config
        check_choice("dims", c.dims, (1, 2, 3))
        check_choice("backbone", c.backbone, ("auto", "unet", "deepmedic"))
        if c.rank < 0 or c.mc_samples < 1 or c.diagonal_min <= 0:
            raise ValueError(f"rank={c.rank}, mc_samples={c.mc_samples}, diagonal_min="
                             f"{c.diagonal_min}: rank is at least 0, mc_samples at least 1, "
                             "diagonal_min above 0")
        self.backbone = build_backbone(c) if backbone is None else backbone
        features, conv = self.backbone.out_channels, CONV[c.dims]
        self.mean = conv(features, c.num_classes, 1)
        self.log_diagonal = conv(features, c.num_classes, 1)
        self.factor = conv(features, c.rank * c.num_classes, 1) if c.rank else None
        # difference 3: start with variances of about 0.02 and a tenth of PyTorch's usual factor
        with torch.no_grad():
            self.log_diagonal.bias -= 4
            if self.factor is not None:
                self.factor.weight *= 0.1
                self.factor.bias *= 0.1

    def distribution(self, image: Tensor) -> LowRankNormal:
        """The normal distribution over logit maps (B, K, *S) of Eq. 5."""
        if isinstance(self.backbone, DeepMedic):
            maps = self.backbone.stitch(image, self._maps)
        else:
            maps = self._maps(self.backbone(image))
        return self._normal(*maps)

    def _maps(self, features):
        """features (B, F, *S) -> mean, log diagonal (B, K, *S) and, if any, factor (B, R*K, *S)."""
        heads = [self.mean, self.log_diagonal]
        if self.factor is not None:
            heads.append(self.factor)
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 would round the maps
            return [head(features.float()) for head in heads]

    def _normal(self, mean, log_diagonal, factor=None):
        # the diagonal is a variance, but the bound is on its log std, which is half of its log
        diagonal = torch.exp(2 * bounded_log_std(log_diagonal / 2))
        if factor is not None:
            factor = factor.unflatten(1, (self.config.rank, self.config.num_classes))
        return LowRankNormal(mean, factor, diagonal + self.config.diagonal_min)

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Eq. 7 in nats, summed over pixels and averaged over the batch: (loss, terms).

        image (B, C, *S), label int64 (B, *S), ignored where it is 255 or mask (B, *S) is False.
        With DeepMedic, the loss is that of one random patch of every volume.
        """
        label = valid_label(label, mask)
        if isinstance(self.backbone, DeepMedic):
            image, label = self.backbone.random_patches(image, label)
        # not `distribution`, which with DeepMedic puts a whole volume together from tiles
        normal = self._normal(*self._maps(self.backbone(image)))
        # M/2 draws and their mirror images about the mean, difference 1: less variance
        samples = normal.sample(self.config.mc_samples, antithetic=True)
        log_prob = -cross_entropy(samples, label)  # (M, B)
        loss = (math.log(len(log_prob)) - log_prob.logsumexp(0)).mean()
        return loss, {"negative_log_likelihood": loss.detach()}

    forward = loss

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None, *,
               temperature: float = 1.0) -> Tensor:
        """n logit maps, (n, B, K, *S), from one pass of the network."""
        return self.distribution(image).sample(n, generator, temperature=temperature)

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Probabilities (B, K, *S) of the most likely logit map, the mean."""
        return self.distribution(image).mean.softmax(1)

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int, mask: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
        """log p(y | x) in nats, (B,), by Eq. 7 with n samples: on average a lower bound."""
        normal, label = self.distribution(image), valid_label(label, mask)
        chunk = samples_at_once(normal.mean.numel(), image.device)
        parts = [-cross_entropy(normal.sample(min(chunk, n - i), generator), label)
                 for i in range(0, n, chunk)]
        return torch.cat(parts).logsumexp(0) - math.log(n)


def build_backbone(c: SSNConfig) -> nn.Module:
    """The network that the config's `backbone` names."""
    if c.backbone == "unet" or (c.backbone == "auto" and c.dims < 3):
        return DetUNet(c.in_channels, c.channels, dims=c.dims, convs=c.convs)
    if c.dims != 3:
        raise ValueError(f"backbone='deepmedic' with dims={c.dims}: it is for dims=3")
    return DeepMedic(c.in_channels, DeepMedicConfig(**c.deepmedic))


# ------------------------------------------------------------------------- the toy of Sec. 5.1


class FreeMaps(nn.Module):
    """Replaces the network: the features of pixel i are the i-th unit vector, so that the weights
    (plus a bias) of the three 1-wide convolutions are the maps themselves."""

    def __init__(self, pixels: int):
        super().__init__()
        self.out_channels = pixels
        self.register_buffer("units", torch.eye(pixels), persistent=False)

    def forward(self, image):
        return self.units.expand(len(image), -1, -1)


def train_toy(image: Tensor, label: Tensor, rank: int, steps: int = 2500,
              mean_steps: int = 200) -> SSN:
    """Fit the three free maps to equally likely label maps of one image; first the mean alone.

    image (B, 1, S), B times the same; label (B, S), the label maps.
    """
    torch.manual_seed(0)
    model = SSN(SSNConfig(dims=1, rank=rank, mc_samples=200), backbone=FreeMaps(label.shape[-1]))
    optimizer = torch.optim.Adam(model.mean.parameters(), lr=0.4)
    for _ in range(mean_steps):
        optimizer.zero_grad()
        cross_entropy(model.distribution(image).mean, label).mean().backward()
        optimizer.step()
    # A new optimiser, as in the authors' code: moments of the first phase would distort its steps.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.4, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(image, label)[0].backward()
        optimizer.step()
        decay.step()
    return model


if __name__ == "__main__":
    import data
    from analysis.paper_figures import plot_toy

    torch.set_num_threads(1)  # tensors of 21 pixels: a second thread would only wait
    line = data.load("toy1d")
    label = line.labels[0].long()  # (2, 21)
    image = line.images.expand(2, -1, -1)
    models = {}
    for name, rank in (("diagonal", 0), ("low-rank", 2)):
        models[name] = train_toy(image, label, rank)
        nats = models[name].log_likelihood(image, label, 200_000).mean()
        print(f"{name}: log-likelihood {nats:.3f}", flush=True)
    # The two maps differ in 7 pixels. Independent pixels pay log 1/2 for each, a joint choice once.
    print(f"the best possible: diagonal 7 log 1/2 = {7 * math.log(0.5):.3f}, "
          f"low-rank log 1/2 = {math.log(0.5):.3f}")
    plot_toy(models, image, label, "ssn_toy.png")
    print("mean, covariance and samples: ssn_toy.png")
