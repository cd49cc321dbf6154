"""langchain-openai with an API key: `python langchain_client.py BASE_URL KEY MODEL`.

Asks for a chat, then for a streamed one, until a call is refused; prints one JSON object, which the flow test reads.
"""

import json
import sys
from typing import Any

import openai
from langchain_openai import ChatOpenAI

base_url, key, model = sys.argv[1:]
chat = ChatOpenAI(model=model, base_url=base_url, api_key=key, max_tokens=6, max_retries=0)  # type: ignore[call-arg]
answer: dict[str, Any] = {"texts": [], "refusal": None}
try:
    answer["texts"].append(chat.invoke("Name three rivers.").content)
    answer["texts"].append("".join(str(chunk.content) for chunk in chat.stream("Name three rivers.")))
    chat.invoke("One too many.")
except (openai.RateLimitError, openai.AuthenticationError) as error:
    # langchain has errors of its own below OpenAI's.
    kind = openai.RateLimitError if isinstance(error, openai.RateLimitError) else openai.AuthenticationError
    answer["refusal"] = {
        "name": kind.__name__,
        "status": error.status_code,
        "retry_after": error.response.headers.get("retry-after"),
    }
print(json.dumps(answer))
