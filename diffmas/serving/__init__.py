"""Teams behind OpenAI's chat interface, batched over their own decoding loop (`diffmas serve`).

team        a system under a name, and what a request may ask of it
batcher     one thread owns all models; a batch is what waits and can be decoded side by side
pieces      a text that is sent while it is written
protocol    requests and answers in OpenAI's form
server      FastAPI around these; the only file that imports it
export      a team as a directory to give away, with a model card
"""
