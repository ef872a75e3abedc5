"""Tiny random networks of real classes that read images, in folders, as their checkpoints lie."""

import torch

from diffalign._compat import ensure_torchvision

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DETECTED = {0: "person", 1: "mouse", 2: "diningtable", 3: "dog"}


def saved(model, folder, spread=3.0, seed=0):
    """The model with wider weights, away from the near-constant network of the initialisation, in a folder."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(spread).add_(0.02 * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(folder)
    return folder


def write_dino(folder):
    """DINO: a ViT without pooler, 32 pixels, squashed."""
    ensure_torchvision()
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    ViTImageProcessorPil(size={"height": 32, "width": 32}, **means).save_pretrained(folder)
    torch.manual_seed(0)
    return saved(ViTModel(ViTConfig(**TOWER, image_size=32, patch_size=8), add_pooling_layer=False), folder)


def write_dinov2(folder):
    """DINOv2: shortest edge 32, centre crop of 28."""
    ensure_torchvision()
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessorPil(**sizes, resample=3).save_pretrained(folder)
    torch.manual_seed(0)
    return saved(Dinov2Model(Dinov2Config(**TOWER, image_size=28, patch_size=14)), folder)


def write_dpt(folder, bias=1.0):
    """A depth network, 32 pixels, squashed."""
    ensure_torchvision()
    from transformers import DPTConfig, DPTForDepthEstimation
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    layers = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8]}
    torch.manual_seed(0)
    config = DPTConfig(**(TOWER | layers), image_size=32, patch_size=8, fusion_hidden_size=8, readout_type="project")
    model = DPTForDepthEstimation(config)
    with torch.no_grad():
        model.head.head[-2].weight.mul_(600)  # before the last ReLU
        model.head.head[-2].bias.fill_(bias)
    return saved(model, folder)


def write_depth_anything(folder):
    """A depth network whose processor keeps the ratio of the sides, in multiples of the patch of 14 pixels."""
    ensure_torchvision()
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    size = {"size": {"height": 28, "width": 28}, "keep_aspect_ratio": True, "ensure_multiple_of": 14}
    DPTImageProcessorPil(**size).save_pretrained(folder)
    stages = {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, "apply_layernorm": True}
    backbone = Dinov2Config(**(TOWER | {"num_hidden_layers": 4}), image_size=28, patch_size=14, **stages)
    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "head_hidden_size": 8, "reassemble_hidden_size": 32}
    torch.manual_seed(0)
    model = DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=backbone, **sizes))
    with torch.no_grad():
        model.head.conv3.bias.fill_(1)  # before the last ReLU
    return saved(model, folder)


def write_segformer(folder):
    """A segmentation network of five classes, whose output has a quarter of the resolution."""
    ensure_torchvision()
    from transformers import SegformerConfig, SegformerForSemanticSegmentation
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 16, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=5))
    return saved(model, folder)


def write_mask2former(folder):
    """An instance segmentation network of four classes and five queries."""
    ensure_torchvision()
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    heads = {"depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 2, "out_features": stages}
    backbone = SwinConfig(image_size=64, embed_dim=8, **heads)
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "dim_feedforward"), 32)
    sizes |= {"encoder_feedforward_dim": 16, "num_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=backbone, num_queries=5, id2label=DETECTED, **sizes)
    return saved(Mask2FormerForUniversalSegmentation(config), folder)


def write_yolos(folder):
    """A box detector of four classes and five detection tokens."""
    ensure_torchvision()
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    torch.manual_seed(0)
    config = YolosConfig(**TOWER, image_size=[32, 32], patch_size=8, num_detection_tokens=5, id2label=DETECTED)
    return saved(YolosForObjectDetection(config), folder)
