"""The whole story in one script: train a small classifier on scikit-learn's digits, compress it, use the ONNX file.

Run it in any folder; it writes `quickstart-compressed/` there.
"""

import numpy as np
import torch

import compress_uq as cuq


def main() -> None:
    """Train, compress, save, predict."""
    # Digits, with a tenth of the training images set aside for calibration before anything is trained.
    splits = cuq.hold_out(cuq.load_splits("digits", reserve=False))

    # A dense model. Any trained torch.nn.Module that returns logits would do.
    torch.manual_seed(0)
    dense = cuq.build_model("compress-uq:cnn", num_classes=10, input_shape=(1, 8, 8))
    dense = cuq.finetune(dense, splits, epochs=3).model

    # Prune, fine-tune, add uncertainty, calibrate, export and measure.
    bundle = cuq.compress(
        dense, splits, sparsity=0.6, uq="mc-dropout", epochs=4, arch="compress-uq:cnn", progress=show_stage
    )
    folder = bundle.save("quickstart-compressed", overwrite=True)

    # The report card: the dense model and the exported file on the same test images.
    for name in ("accuracy", "ece", "ause", "ood_auroc"):
        before, after = bundle.card.dense.metrics[name], bundle.card.onnx.metrics[name]
        print(f"{name:10} dense {before.value:.4f}   onnx {after.value:.4f} [{after.low:.4f}, {after.high:.4f}]")

    # The exported file needs onnxruntime and numpy, and no torch.
    predictor = cuq.OnnxPredictor(folder / "model.onnx")
    images = np.stack([splits.test[i][0].numpy() for i in range(4)])
    answers = predictor(images)
    names = predictor.metadata["labels"]
    for label, confidence, uncertainty in zip(answers.label, answers.confidence, answers.uncertainty, strict=True):
        print(f"digit {names[label]}: confidence {confidence:.3f}, uncertainty {uncertainty:.3f}")


def show_stage(event: cuq.Progress) -> None:
    """One line when a stage ends."""
    if event.step == event.steps:
        print(f"{event.stage} done {event.note}".rstrip())


if __name__ == "__main__":
    main()
