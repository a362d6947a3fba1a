"""What a rule without figures lets pass, each with its reason. An entry that is not needed any more fails, too."""

from __future__ import annotations

MORE_PARAMETERS = {  # of more than seven: path and function
    # What users call: they give theirs by name, and most have defaults.
    "aiotransfer/engine/open.py open_engine": "what an application may choose about an engine, in one place",
    "aiotransfer/engine/operations/operations.py Operations.write_pages": "two tables of pages, each with its stride and offset",
    "aiotransfer/engine/operations/operations.py Operations.read_pages": "the same as write_pages, from a peer",
    "aiotransfer/engine/operations/operations.py Operations.prepare_pages": "the same as write_pages, to be posted later",
    "aiotransfer/engine/operations/from_thread.py ThreadHandle.write_pages": "the same as write_pages, from another thread",
    "aiotransfer/kv/decode/decoder.py Decoder.__init__": "the layout of a KV cache, and the waits of a request",
    "aiotransfer/kv/decode/decoder.py Decoder.request": "what one request may say, which differs from request to request",
    "aiotransfer/kv/threads/decoder_thread.py DecoderThread.start": "the same as Decoder.request, from another thread",
    "aiotransfer/kv/prefill/prefiller.py Prefiller.__init__": "the layout of a KV cache, and the bounds of the role",
    "aiotransfer/moe/alltoall.py AllToAll.__init__": "the shape of a mixture of experts, which every rank must give alike",
    "aiotransfer/weights/layouts/derive.py layout_of": "what a framework's tensors do not say by themselves",
    "aiotransfer/weights/layouts/layout.py Layout.from_arrays": "a layout by columns, one argument for each",
    "aiotransfer/weights/planning/planner.py make_plan": "both sides, and what a plan may use of them",
    "aiotransfer/weights/publisher/publisher.py Publisher.__init__": "the rank, its peers, and the bounds of an update",
    "aiotransfer/weights/subscriber/subscriber.py Subscriber.__init__": "the rank, its peers, and the bounds of an update",
    # Classes that users see and the library makes, in few places and by name.
    "aiotransfer/engine/engine.py Engine.__init__": "takes what open_engine takes, with the platform and the environment",
    "aiotransfer/engine/memory/region.py Region.__init__": "one registration: its place, its rights and what keeps it",
    "aiotransfer/engine/operations/plan.py Plan.__init__": "one prepared operation of any kind: what it moves, and how",
    # Programs for a GPU: a launch takes addresses and numbers, and no structure of them.
    "aiotransfer/moe/kernels/gpu_programs.py move_kernel": "Triton passes each address, count and stride by itself",
    "aiotransfer/moe/kernels/gpu_programs.py weigh_kernel": "Triton passes each address, count and stride by itself",
    "aiotransfer/weights/kernels/gpu_programs.py cast_kernel": "Triton passes each address, count and stride by itself",
    "aiotransfer/weights/kernels/gpu_programs.py quantise_kernel": "Triton passes each address, count and stride by itself",
}
