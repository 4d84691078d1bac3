"""A tokenizer's step against a discriminator: two engines that learn from each other (paper section 1: "details as
VQGAN").

No gradient can be asked of a tensor that came out of a DeepSpeed engine but by engine.backward, once. So the picture
is cut off behind the tokenizer, at a leaf; every loss of the picture gives its gradient at this leaf, and their sum is
what the tokenizer's one backward pass starts from. The adaptive weight compares two of these gradients at the
detokenizer's last weight, which follow from those at the leaf and that layer's input.

Both forwards of a micro-batch depend on it as a whole: the adaptive weight is one number for the micro-batches of all
ranks, and a discriminator with batch norm takes the statistics of each rank's own micro-batch.
"""

import torch
from torch import Tensor

from mage_ds.engine import process, state
from mage_ds.models import Vqgan
from mage_ds.models.adversary import adaptive_weight, generator_loss, hinge
from mage_ds.recipes.sections import Adversary


class Opponent:
    """What the discriminator does in a step. It takes part from step `start` on.

    vqgan: the tokenizer inside the engine, whose last layer is listened to; dtype: of the discriminator's inputs.
    """

    def __init__(self, numbers: Adversary, vqgan: Vqgan, start: int, dtype: torch.dtype):
        self.start, self._numbers, self._dtype = start, numbers, dtype
        self._last = LastLayer(vqgan.decoder.conv_out)

    def pull(self, engine, leaf: Tensor, valid: Tensor, away: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted gradient of the adversarial loss at the reconstructions, and what is logged of it.

        engine: the discriminator's; leaf: reconstructions (B, 3, H, W), float32, cut off; valid (B,); away: gradient
        of the reconstruction loss at the leaf. All ranks call it.
        """
        # Not by the engine: its forward expects a backward of its own. Only the leaf's gradient is computed.
        logits = engine.module(leaf.to(self._dtype))
        loss = (generator_loss(logits) * valid).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        reconstruction, adversarial = self._last.gradients(away, gradient)
        weight = self._numbers.weight * adaptive_weight(reconstruction, adversarial, self._numbers.most)
        return weight * gradient, {
            "adversarial": loss,
            "adaptive_weight": weight,
            "reconstruction_norm": reconstruction.norm(),
            "adversarial_norm": adversarial.norm(),
        }

    def loss(self, engine, real: Tensor, fake: Tensor, valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's hinge loss of a micro-batch, and what is logged of it: its margin is real - fake logit.

        real, fake: pictures (B, 3, H, W) that carry no gradient. Each goes forward alone, because of batch norm.
        """
        # One of the two through the engine, which prepares one backward pass for each of its forwards.
        real_logits = engine.module(real.to(self._dtype)).float()
        fake_logits = engine(fake.to(self._dtype)).float()
        loss = (hinge(real_logits, fake_logits) * valid).mean()
        means = {"real_logit": real_logits, "fake_logit": fake_logits}
        logs = {name: (logits.flatten(1).mean(1) * valid).mean() for name, logits in means.items()}
        return loss, {"discriminator_loss": loss, **logs}


class LastLayer:
    """The convolution that makes the picture: its weight's gradients from those of the picture."""

    def __init__(self, convolution: torch.nn.Conv2d):
        self._shape, self._padding = state.shape_of(convolution.weight), convolution.padding
        self._input = None
        convolution.register_forward_pre_hook(self._keep)

    def _keep(self, convolution, inputs: tuple[Tensor]) -> None:
        if torch.is_grad_enabled():  # then autograd keeps it as well
            self._input = inputs[0].detach()

    def gradients(self, *pictures: Tensor) -> Tensor:
        """Gradients (n, 3, C, k, k) of the weight, float32, averaged over the ranks, for n gradients (B, 3, H, W) of
        the pictures that its last forward made. All ranks call it."""
        channels, *rest = self._shape
        shape = (channels * len(pictures), *rest)
        x, self._input = self._input.float(), None
        joined = torch.nn.grad.conv2d_weight(x, shape, torch.cat(pictures, dim=1), padding=self._padding)
        return process.sum_over_ranks(joined.unflatten(0, (len(pictures), channels))) / process.start().world
