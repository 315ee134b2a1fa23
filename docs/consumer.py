"""Run a streaming file of `essl_export --stream` over a recording, chunk by chunk, as a device would.

    python consumer.py model.onnx speech.wav

It needs onnxruntime, numpy and soundfile, and neither PyTorch nor essl_nb.
"""
import json
import sys
import time

import numpy as np
import onnxruntime
import soundfile


def main(model, sound):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    if "frames_per_call" not in about:
        sys.exit(f"{model} is not a streaming file of essl_export --stream.")
    rate, new, ahead, frames = (int(about[k]) for k in ("sample_rate", "new_samples_per_call", "right_context_samples", "frames_per_call"))
    wav, found = soundfile.read(sound, dtype="float32", always_2d=True)
    if found != rate:
        sys.exit(f"{sound} has {found} samples per second and {model} hears {rate}; resample it first.")
    calls = -(-len(wav) // new)
    wav = np.pad(wav.mean(1), (0, calls * new + ahead - len(wav)))[None]  # silence fills the last chunk
    state = {name: np.zeros((1, *shape), np.int64 if name == "position" else np.float32) for name, shape in json.loads(about["states"]).items()}
    made, seconds = [], []
    for k in range(calls):
        began = time.perf_counter()
        out, *after = session.run(None, {"samples": wav[:, k * new : (k + 1) * new + ahead], **state})
        seconds.append(time.perf_counter() - began)
        state = dict(zip(state, after))
        made.append(out[0])
    y = np.concatenate(made)  # (frames, features), or (frames, classes) of a recogniser
    print(f"{len(y)} frames of {y.shape[1]}; {frames * 1000 * new // frames // rate} ms of sound in {1000 * np.median(seconds):.2f} ms a chunk (median)", file=sys.stderr)
    if "symbols" in about:
        best = y.argmax(1)
        classes = best[np.insert(best[1:] != best[:-1], 0, True)]  # CTC: repeats count once, class 0 is the blank
        print("".join(json.loads(about["symbols"])[c - 1] for c in classes if c).replace("▁", " ").strip())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
