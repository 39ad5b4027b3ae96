"""What a type checker and an editor see of the root; a test compares it with what is loaded there."""

from vlmfilm_plugin.checkpoints.film_weights import apply_adapter as apply_adapter
from vlmfilm_plugin.checkpoints.film_weights import export_adapter as export_adapter
from vlmfilm_plugin.checkpoints.soft_seg_layout import to_port_layout as to_port_layout
from vlmfilm_plugin.encoders.base import Encoder as Encoder
from vlmfilm_plugin.encoders.base import EncoderIdentity as EncoderIdentity
from vlmfilm_plugin.encoders.base import Identity as Identity
from vlmfilm_plugin.encoders.qwen2_5_vl import QwenVLMTextGenerator as QwenVLMTextGenerator
from vlmfilm_plugin.errors import CheckpointError as CheckpointError
from vlmfilm_plugin.errors import ConditionError as ConditionError
from vlmfilm_plugin.errors import EncoderError as EncoderError
from vlmfilm_plugin.errors import FeatureError as FeatureError
from vlmfilm_plugin.errors import HostError as HostError
from vlmfilm_plugin.errors import ImageReadError as ImageReadError
from vlmfilm_plugin.errors import MissingFeatureError as MissingFeatureError
from vlmfilm_plugin.errors import SettingsError as SettingsError
from vlmfilm_plugin.errors import StoreError as StoreError
from vlmfilm_plugin.errors import TargetMatchError as TargetMatchError
from vlmfilm_plugin.errors import VlmFilmError as VlmFilmError
from vlmfilm_plugin.film.gate_view import GateView as GateView
from vlmfilm_plugin.film.gates import register_gate as register_gate
from vlmfilm_plugin.film.heads import Head as Head
from vlmfilm_plugin.film.heads import HeadShape as HeadShape
from vlmfilm_plugin.film.heads import register_head as register_head
from vlmfilm_plugin.film.layers import AdaptiveFiLMHead as AdaptiveFiLMHead
from vlmfilm_plugin.film.layers import ImageToConditionVector as ImageToConditionVector
from vlmfilm_plugin.film.layers import TextToConditionVector as TextToConditionVector
from vlmfilm_plugin.forward.attach import attach as attach
from vlmfilm_plugin.forward.handle import FilmHandle as FilmHandle
from vlmfilm_plugin.host_spec import Config as Config
from vlmfilm_plugin.host_spec import HostSpec as HostSpec
from vlmfilm_plugin.host_spec import Masks as Masks
from vlmfilm_plugin.host_spec import Model as Model
from vlmfilm_plugin.host_spec import RowView as RowView
from vlmfilm_plugin.host_spec import Steps as Steps
from vlmfilm_plugin.host_spec import UNet as UNet
from vlmfilm_plugin.host_spec import hookimpl as hookimpl
from vlmfilm_plugin.hosts.activation import activate as activate
from vlmfilm_plugin.hosts.activation import running_batch as running_batch
from vlmfilm_plugin.inspection.look import inspect as inspect
from vlmfilm_plugin.inspection.report import Inspection as Inspection
from vlmfilm_plugin.inspection.report import SeenStage as SeenStage
from vlmfilm_plugin.inspection.report import SeenUNet as SeenUNet
from vlmfilm_plugin.soft_seg.apply import apply_vlm_film as apply_vlm_film
from vlmfilm_plugin.soft_seg.conditioner import VLMConditioner as VLMConditioner
from vlmfilm_plugin.soft_seg.conditioner import VLMFiLMConditioner as VLMFiLMConditioner
from vlmfilm_plugin.warmup.encode import warmup_vlm_cache as warmup_vlm_cache

__version__: str
__all__: list[str]
