"""Bottleneck adapters: a small network behind the attention and the MLP of every block; only it is trained.

    h ← h + W_up act(W_down h + b_down) + b_up      W_down (m, D), W_up (D, m), m far below D
                                                    (Houlsby et al. 2019, arXiv:1902.00751, figure 2)

h is what attention or MLP adds to the residual stream: the output of o_proj or of down_proj. W_up is 0 at the start, so
training begins at the model as it was. One behind down_proj only (--lora_targets down_proj) is the placement of
Pfeiffer et al. 2020 (arXiv:2005.00247, section 3.2): half the parameters, about as good.

Unlike LoRA it cannot be merged, since act is not linear: two thin matrix products per half block stay.
"""

from torch import nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """The adapter behind one linear layer; act is silu."""

    def __init__(self, base, inner):
        """base: the layer (or a quantized one); inner: m, the width of the bottleneck."""
        super().__init__()
        self.bottleneck_down = nn.Linear(base.out_features, inner)
        self.bottleneck_up = nn.Linear(inner, base.out_features)
        nn.init.zeros_(self.bottleneck_down.bias)
        nn.init.zeros_(self.bottleneck_up.weight)
        nn.init.zeros_(self.bottleneck_up.bias)

    def forward(self, base, x):
        """x (..., in) -> (..., out): base is the frozen layer."""
        h = base(x)
        return h + self.bottleneck_up(F.silu(self.bottleneck_down(h)))

    def stored(self, tensors):
        """The tensors of a folder: as they are."""
        return tensors
