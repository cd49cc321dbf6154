// A Node client of the public gRPC API over the protos as they are:
//   node client.mjs PROTOS_FOLDER HOST:PORT
// Prints one JSON object with what the service answered; the flow test reads it.
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [protos, address] = process.argv.slice(2);

const definition = loader.loadSync("headrace/v1/inference.proto", { includeDirs: [protos], enums: String });
const { Inference } = grpc.loadPackageDefinition(definition).headrace.v1;
const client = new Inference(address, grpc.credentials.createInsecure());

function unary(method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, (error, reply) => (error ? reject(error) : resolve(reply)));
  });
}

async function generate(request) {
  const answer = { text: "", deltas: 0, finishReason: null, usage: null };
  for await (const delta of client.Generate(request)) {
    answer.text += delta.text;
    answer.deltas += 1;
    answer.finishReason = delta.finishReason ?? answer.finishReason;
    answer.usage = delta.usage ?? answer.usage;
  }
  return answer;
}

async function refusal(request) {
  try {
    await generate(request);
    return null;
  } catch (error) {
    return { code: grpc.status[error.code], details: error.details };
  }
}

const { models } = await unary("ListModels", {});
const model = models[0].name;
const question = { messages: [{ role: "user", content: "What is the capital of France?" }] };
const greedy = { temperature: 0 };

console.log(
  JSON.stringify({
    model,
    tokens: (await unary("Tokenize", { model, text: "Water boils at" })).tokenIds,
    chat: await generate({ model, chat: question, sampling: greedy, stopping: { maxTokens: 32 } }),
    text: await generate({ model, text: "Water boils at", sampling: greedy, stopping: { maxTokens: 8, ignoreEos: true } }),
    refusal: await refusal({ model: "nobody", text: "x" }),
  }),
);
client.close();
