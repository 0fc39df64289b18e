"""What this package keeps on the modules of a network: the names of attributes in a module's ``__dict__``.

There they are no children and no parameters, and are copied and pickled along.
"""

from __future__ import annotations

from torch import nn

# The call sites of a module, by place.
SITES = "_call_sites"
# The places that were seen, whether they needed a site or not.
SEEN = "_places_seen"
# A batch norm of another class than PyTorch's own that was folded into the layer before it.
FOLDED = "_folded_away"
# The module at a call site that is reached in a trace only.
IN_TRACES_ONLY = "_in_traces_only"
# The module at a call site: the id of the module in whose code the operation is called.
OWNER = "_owner"
# The module at a call site: the name, in the network, of the parameter that it is passed as its weight; "" for others.
WEIGHT = "_weight_parameter"
# The names of the sites that a list of modules holds itself, and where those are while the list is read.
LIST_SITES, HIDDEN_SITES = "_sites_of_a_list", "_hidden_sites"
# The outermost module: which buffers a pass may write rounded values into, as modules and the names there.
BUFFERS = "_written_buffers"
# A batch norm that no layer took in, a depthwise convolution on the device: over how many axes besides the channels.
DEPTHWISE = "_is_depthwise_on_the_device"
# A layer with a bias, a softplus or a tanh: the quantizer that rounds its input.
ROUNDED_BY = "_input_rounded_by"
# A softplus or a tanh behind a product with a number, which hands integers on: what rounded these, and the number.
SCALED_FROM = "_input_scaled_from"
# A sigmoid whose output is multiplied with what it is of, as in SiLU.
GATES = "_gates"
# A choice between tensors and numbers, one of which stands for minus infinity: the size of the smallest of these.
FILLS = "_fills_in_minus_infinity"
# Of a layer that chooses: whether the mask comes from what the network computes.
MASK_IS_COMPUTED = "_mask_is_computed"
# Numbers of at least this size stand for infinity where they are put in place of scores, or added to them. People write
# -1e3, -1e4 and what is below it.
INFINITE = 1e3
# The Python number that an operation was called with when it was found.
NUMBER = "_number"
# A product in front of a softmax: the number that takes the place of one that stands for infinity, and whether its
# ranges are being calibrated. What is masked is MASKED then: finite, so that a row of nothing else is.
MASKED_FACTOR, IS_CALIBRATED = "_masked_factor", "_is_calibrated"
MASKED = 1e30
# A tensor that a recurrent layer made as its first state, since none was passed.
DEFAULT_STATE = "_is_default_state"

# These are iterated over: no place for a child of ours, if there is another.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# The layers that make such a state.
RECURRENT = (nn.RNNBase, nn.RNNCellBase)

# What AIMET's layers keep their quantizers in.
QUANTIZERS = ("param_quantizers", "input_quantizers", "output_quantizers")


def is_at_call_site(module: nn.Module) -> bool:
    """Return whether a module was made for a call site."""
    return OWNER in vars(module)


def is_range(name: str) -> bool:
    """Return whether a parameter of that name is an end of a quantizer's range."""
    return name.endswith((".min", ".max")) and any(f"{part}." in name for part in QUANTIZERS)
