"""Answers OpenAI's requests from one model, by transformers' own serving handlers.

server         `serve`: loads the model and answers until it is told to end
uvicorn_server uvicorn, which ends cleanly
options        the flags after `--`
app            which path is answered by what
handlers       transformers' handlers, as clients expect them
answers        what a handler's answer lacks
errors         what is wrong with a request, in OpenAI's shape
api_key        who may ask
job            one request on its way, and whether its client still waits
generations    one request after another
token_stream   a generation's tokens, as text for whoever waits
stop_texts     where a text must end
kept_prefixes  the caches of conversations, for their next turns
cache_memory   the memory that a conversation's cache takes
model_manager  the one model
"""
