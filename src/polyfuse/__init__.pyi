"""The types of what `import polyfuse` offers. `make generate` writes this file from the specs."""

from polyfuse._ops import BlockQuantResult as BlockQuantResult
from polyfuse._ops import GatedDeltaRuleResult as GatedDeltaRuleResult
from polyfuse._ops import GdnConvPrepResult as GdnConvPrepResult
from polyfuse._ops import GdnInProjResult as GdnInProjResult
from polyfuse._ops import GdnPostConvResult as GdnPostConvResult
from polyfuse._ops import RmsNormBlockQuantResult as RmsNormBlockQuantResult
from polyfuse._ops import SiluMulBlockQuantResult as SiluMulBlockQuantResult
from polyfuse._ops import block_quant as block_quant
from polyfuse._ops import gated_delta_rule as gated_delta_rule
from polyfuse._ops import gated_rms_norm as gated_rms_norm
from polyfuse._ops import gdn_conv_prep as gdn_conv_prep
from polyfuse._ops import gdn_decode as gdn_decode
from polyfuse._ops import gdn_in_proj as gdn_in_proj
from polyfuse._ops import gdn_post_conv as gdn_post_conv
from polyfuse._ops import pos_embed_interpolate as pos_embed_interpolate
from polyfuse._ops import rms_norm_block_quant as rms_norm_block_quant
from polyfuse._ops import segment_attention as segment_attention
from polyfuse._ops import silu_mul_block_quant as silu_mul_block_quant
from polyfuse.bench.warmup import warmup as warmup
from polyfuse.conformance.shadow import shadow_report as shadow_report
from polyfuse.dispatch import call_counts as call_counts
from polyfuse.dispatch import explain as explain
from polyfuse.dispatch import refresh as refresh
from polyfuse.dispatch import use_backend as use_backend
from polyfuse.spec import BackendError as BackendError
from polyfuse.spec import SpecError as SpecError
from polyfuse.spec import Unsupported as Unsupported

__version__: str
gdn_conv_post = gdn_conv_prep
