// OpenAI's Node client with an API key:
//   node client.mjs BASE_URL KEY MODEL CALLS
// Calls one after the other, until one is refused; prints one JSON object, which the flow test reads.
import OpenAI from "openai";

const [baseURL, apiKey, model, calls] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

const answer = { texts: [], remaining: [], refusal: null };
for (let call = 0; call < Number(calls) && !answer.refusal; call += 1) {
  try {
    const { data, response } = await client.completions.create({ model, prompt: "Hello", max_tokens: 4 }).withResponse();
    answer.texts.push(data.choices[0].text);
    answer.remaining.push(response.headers.get("x-ratelimit-remaining-requests"));
  } catch (error) {
    answer.refusal = { name: error.constructor.name, status: error.status, code: error.code };
  }
}
console.log(JSON.stringify(answer));
