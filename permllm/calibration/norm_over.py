"""What norms of inputs are a mean over."""

from typing import Literal

NormOver = Literal["tokens", "samples"]
