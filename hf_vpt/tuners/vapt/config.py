"""Config of VAPT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..base import PromptConfig


Pooling = Literal["conv", "linear"]
Activation = Literal["relu", "gelu", "sigmoid", "softmax", "identity"]


@dataclass
class VAPTConfig(PromptConfig):
    """Adapts a frozen ViT with prompts that each block makes from the image: VAPT (arXiv 2501.18936).

    The first `num_static_layers` blocks get learned prompts, as VPT does. Every later block i makes its own from the
    patches of its input, with a LayerNorm, a pooling of the patch grid to N positions and a feature projector:

        Z = LayerNorm_i(patches)   A = mix_i(channel_dropout(conv_i(Z))) + b_i   P_i = A + c·W₂·dropout(σ(W₁·A))

    Mixing weights and b start at zero, so adaptive prompts do too. There a LayerNorm has the slope 1/√eps (1e6 in
    Transformers' ViT), and so has the first gradient: clip gradients, as `Trainer` does. Deep prompts only.

    Tuned numbers with L blocks, s of them static, a conv with one kernel and a shared projector:
    s·N·D + (L − s)·(2·D + k² + N·h'·w' + N) + 2·D·r, h' = h + 2·padding − k + 1. ViT-B/16, N=10: 55,608.

    Args:
        num_static_layers: Number s of blocks, the first ones, with learned prompts; 1 in the paper, 0 for none.
        pooling: `"conv"` convolves the patch grid before its positions are mixed, `"linear"` mixes the patches
            themselves.
        kernel_size: Height and width k of the kernel in patches; published: 2.
        padding: Patches of zeros around the grid, less than k.
        shared_kernel: One kernel for all channels of a block (`True`), or one for each channel.
        channel_dropout: Probability with which a channel of the pooled map is zeroed while training; published: 0.1.
        projector_dim: Hidden width r of the projector; published: 8.
        projector_activation: σ.
        projector_dropout: Dropout in the projector; published: 0.1.
        shared_projector: One projector for all blocks (`True`), or one for each.
        learnable_scale: Whether c is learned, from 1 at the start, or stays 1.
        prompt_dropout: Dropout on the learned prompts of the first blocks; published: 0.1. Adaptive prompts have none.
        grid: Rows and columns `[h, w]` of patches that the adapter is made for. `None` takes those of the model's own
            image size. Set it where images have another size, for example DINOv2 (made for 518 pixels) at 224.
            `"interpolate"` is short for `None` with `interpolate_grid=True`.
        interpolate_grid: Whether images of another grid are welcome: means over areas take their normalised patches to
            the adapter's grid before they are pooled. `False` makes another grid an error.

    In a backbone with stages (Swin) the grid is that of the first; each later one has half the rows and columns,
    rounded up, and blocks of one width share a projector.

    See `PromptConfig` for the other arguments.

    Example:
        >>> model = get_peft_model(vit, VAPTConfig(num_virtual_tokens=10))
        >>> model.print_trainable_parameters()
    """

    method_name: ClassVar[str] = "HFVPT_VAPT"
    title: ClassVar[str] = "VAPT"
    paper: ClassVar[str] = "2501.18936"

    prompt_dropout: float = field(default=0.1, metadata={"help": "Dropout on the learned prompts while training."})
    num_static_layers: int = field(default=1, metadata={"help": "Number of first blocks with learned prompts."})
    pooling: Pooling = field(default="conv", metadata={"help": "Convolve the patch grid before mixing, or only mix."})
    kernel_size: int = field(default=2, metadata={"help": "Height and width of the pooling kernel in patches."})
    padding: int = field(default=0, metadata={"help": "Patches of zeros around the grid."})
    shared_kernel: bool = field(default=True, metadata={"help": "One kernel for all channels."})
    channel_dropout: float = field(default=0.1, metadata={"help": "Dropout of whole channels of the pooled map."})
    projector_dim: int = field(default=8, metadata={"help": "Hidden width of the feature projector."})
    projector_activation: Activation = field(default="relu", metadata={"help": "Activation of the projector."})
    projector_dropout: float = field(default=0.1, metadata={"help": "Dropout in the projector."})
    shared_projector: bool = field(default=True, metadata={"help": "One projector for all blocks."})
    learnable_scale: bool = field(default=False, metadata={"help": "Learn the scale of the projector."})
    grid: list[int] | str | None = field(
        default=None, metadata={"help": "Rows and columns of patches; those of the model's image size if left out."}
    )
    interpolate_grid: bool = field(default=False, metadata={"help": "Area-pool other grids to the adapter's."})

    def __post_init__(self):
        super().__post_init__()
        if not self.deep:
            self.fail("deep", "True: VAPT makes the prompts of a block from the block's own input")
        self.check_int("num_static_layers", low=0)
        self.check_choice("pooling", Pooling)
        self.check_choice("projector_activation", Activation)
        self.check_int("kernel_size", low=1)
        self.check_int("padding", low=0)
        self.check_int("projector_dim", low=1)
        for name in ("channel_dropout", "projector_dropout"):
            self.check_fraction(name)
        for name in ("shared_kernel", "shared_projector", "learnable_scale", "interpolate_grid"):
            self.check_bool(name)
        if self.grid in ("interpolate", ["interpolate"]):  # the latter from a command line
            self.grid, self.interpolate_grid = None, True
        if isinstance(self.grid, str):
            self.fail("grid", "two positive numbers, the rows and columns of patches, 'interpolate' or None")
        self.grid = self._list_of("grid", int)
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            self.fail("grid", "two positive numbers, the rows and columns of patches, 'interpolate' or None")
        if self.padding >= self.kernel_size:
            self.fail("padding", f"less than kernel_size, which is {self.kernel_size}")
        self.check_grid()

    def check_grid(self) -> None:
        """Raises `ValueError` if the kernel does not fit into the grid."""
        if self.grid is None or self.pooling != "conv":
            return
        smallest = min(self.grid_at(len(self.depths or [1]) - 1))
        if smallest + 2 * self.padding < self.kernel_size:
            self.fail("kernel_size", f"at most {smallest + 2 * self.padding} for a grid of {self.grid} patches")

    def grid_at(self, stage: int) -> tuple[int, int]:
        """Rows and columns of patches in a stage of the backbone."""
        return halved(tuple(self.grid), stage)


def halved(grid: tuple[int, int], times: int) -> tuple[int, int]:
    """A patch grid after some patch mergings, each of which joins 2 × 2 patches and pads an odd side."""
    for _ in range(times):
        grid = tuple(-(-side // 2) for side in grid)
    return grid
