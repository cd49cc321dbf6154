"""litellm with an API key: `python litellm_client.py BASE_URL KEY MODEL`.

Asks for a chat, then for a streamed one, until a call is refused; prints one JSON object, which the flow test reads.
"""

import json
import sys
from typing import Any

import litellm

litellm.suppress_debug_info = True  # it is printed
base_url, key, model = sys.argv[1:]
answer: dict[str, Any] = {"texts": [], "refusal": None}


def ask(words: str, *, stream: bool) -> Any:
    return litellm.completion(
        model=f"openai/{model}",
        messages=[{"role": "user", "content": words}],
        api_base=base_url,
        api_key=key,
        max_tokens=6,
        stream=stream,
        num_retries=0,
        max_retries=0,
    )


try:
    answer["texts"].append(ask("Name three rivers.", stream=False).choices[0].message.content)
    answer["texts"].append("".join(c.choices[0].delta.content or "" for c in ask("Name three rivers.", stream=True)))
    ask("One too many.", stream=False)
except (litellm.RateLimitError, litellm.AuthenticationError) as error:
    headers = error.litellm_response_headers or error.response.headers
    answer["refusal"] = {
        "name": type(error).__name__,
        "status": error.status_code,
        "retry_after": headers.get("retry-after"),
    }
print(json.dumps(answer))
