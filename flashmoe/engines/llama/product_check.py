"""Checks that a program multiplies by the experts that are made ready, and by no others."""

from __future__ import annotations

from flashmoe.engines.llama.ggml import GGML
from flashmoe.errors import FlashMoEError

CHOICE = "ffn_moe_topk-"  # the node with a layer's chosen experts; the layer's number follows


class ProductCheck:
    """Looks at every product of a first graph, until each tensor of experts was seen in one."""

    def __init__(self, ggml: GGML) -> None:
        self._ggml = ggml
        self._tensors: dict[str, tuple[int, int]] = {}  # name -> (address, layer's number)
        self._layers_ready: set[int] = set()  # numbers of layers
        self._seen: set[str] = set()  # tensors
        self._inputs: dict[int, str] = {}  # by layer: what `down` is multiplied with, and
        self.down_addresses: dict[int, int] = {}  # where its weights lie, of the layers seen

    def expect(self, name: str, address: int, layer: int) -> None:
        """A tensor of experts, where its data lies, and the number of its layer in the file."""
        self._tensors[name] = address, layer

    def expects(self, name: str) -> bool:
        return name in self._tensors

    def add_ready(self, layer: int) -> None:
        """What this layer chose is in memory, or it chose nothing."""
        self._layers_ready.add(layer)

    def forget_graph(self) -> None:
        """The rest of the graph at hand will not be computed."""
        self._layers_ready.clear()

    def look_at(self, tensor: int) -> None:
        """Raises FlashMoEError for a product by experts other than those that are made ready.

        ik_llama.cpp multiplies by `up` and `gate` in one node, whose ids come after the input.
        """
        ggml = self._ggml
        sources = [source for n in range(4) if (source := ggml.source_of(tensor, n))]
        given = [ggml.name_of(source) for source in sources]
        names = [_original(name) for name in given]
        for source, name, called in zip(sources, names, given, strict=True):
            if name not in self._tensors or name in self._seen:
                continue
            address, layer = self._tensors[name]
            if name == called and ggml.data_of(source) != address:
                raise FlashMoEError(
                    f"the program made a copy of {name} before its experts were read: leave out "
                    "options that move experts, such as --no-mmap, or -ngl without --cpu-moe"
                )
            if layer not in self._layers_ready or f"{CHOICE}{layer}" not in names[2:4]:
                raise FlashMoEError(
                    f"the program multiplies by {name} in a way that FlashMoE does not know: "
                    "report the model and the version of llama.cpp"
                )
            self._seen.add(name)
            if ".ffn_down" in name:
                self._inputs[layer], self.down_addresses[layer] = names[1], address

    @property
    def down_input(self) -> str:
        """What the inputs of all `down` products are called, but for the layer's number.

        "": they have no such name in common.
        """
        starts = {name.removesuffix(f"-{layer}") + "-" for layer, name in self._inputs.items()}
        common = starts.pop() if len(starts) == 1 else ""
        is_known = all(f"{common}{layer}" == name for layer, name in self._inputs.items())
        return common if is_known else ""

    def is_complete(self, layer: int) -> bool:
        """When a layer comes again, all its products were seen once; of all layers: enough.

        Raises FlashMoEError for a tensor that was not multiplied by.
        """
        if layer not in self._layers_ready:
            return False
        for name, (_, number) in self._tensors.items():
            if number in self._layers_ready and name not in self._seen:
                raise FlashMoEError(
                    f"the program did not multiply by {name} as FlashMoE expects: report the model "
                    "and the version of llama.cpp"
                )
        return True


def _original(name: str) -> str:
    """Of a copy, `CPU#name#0`: the scheduler makes it when it computes, for another device."""
    parts = name.split("#")
    return parts[1] if len(parts) == 3 else name
