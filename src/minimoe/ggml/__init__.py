"""llama.cpp's own libraries, made safe to call: what they say is kept, what kills them dies in a child process.

library.py    the import, the log, functions that the binding leaves out
child.py      a risky call in a process of its own
amx.py        does this build die in quantised prefill?
binding.py    what llama_cpp.Llama lacks
batch.py      tokens in, logits out
header.py     what is wrong with a file that llama.cpp refuses
quantizer.py  llama_model_quantize
"""
from .library import LlamaError, library

__all__ = ["LlamaError", "library"]
