"""`Llama`, a GGUF model as an object: chat, completion, tokens, and what a request is made of."""

from pyllamaernie.llama.llama import Llama as Llama
