// The AI SDK over one wire format: node ai_sdk.mjs chat|responses|messages URL. Prints {feature: "pass" or "FAIL: why"}.
import { generateText, streamText, generateObject, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";
import { createAnthropic } from "@ai-sdk/anthropic";
import { z } from "zod";

const [wire, url] = process.argv.slice(2);
const options = { baseURL: `${url}/v1`, apiKey: "none" };
const named = (name) => ({
  chat: () => createOpenAICompatible({ ...options, name: "helexa", supportsStructuredOutputs: true })(name),
  responses: () => createOpenAI(options).responses(name),
  messages: () => createAnthropic(options)(name),
})[wire]();
const model = named("demo");
const common = { model, maxRetries: 0, temperature: 0, maxOutputTokens: 200 };

const check = (holds, what) => {
  if (!holds) throw new Error(what);
};
const weather = tool({
  description: "Tells the weather in a city.",
  inputSchema: z.object({ city: z.string() }),
});
const question = "How is the weather in Oslo?";

const features = {
  [wire]: async () => {
    const { text, usage } = await generateText({ ...common, prompt: "What is helexa?" });
    check(text.length > 0, "no text");
    check(usage.inputTokens > 0 && usage.outputTokens > 0, `usage: ${JSON.stringify(usage)}`);
  },
  stream: async () => {
    const whole = await generateText({ ...common, prompt: "What is helexa?" });
    let failure = null;
    const streamed = streamText({ ...common, prompt: "What is helexa?", onError: ({ error }) => { failure = error; } });
    let text = "";
    let pieces = 0;
    for await (const piece of streamed.textStream) {
      text += piece;
      pieces += 1;
    }
    if (failure) throw failure;
    check(pieces > 1, `${pieces} pieces`);
    check(text === whole.text, "the streamed text is not the whole one");
  },
  tools: async () => {
    const tools = { get_weather: weather };
    const first = await generateText({ ...common, prompt: question, tools, toolChoice: "required" });
    const [call] = first.toolCalls;
    check(call?.toolName === "get_weather" && typeof call.input.city === "string", JSON.stringify(first.toolCalls));
    const result = { type: "tool-result", toolCallId: call.toolCallId, toolName: call.toolName };
    const after = await generateText({
      ...common,
      tools,
      messages: [
        { role: "user", content: question },
        { role: "assistant", content: [{ type: "tool-call", toolCallId: call.toolCallId, toolName: call.toolName, input: call.input }] },
        { role: "tool", content: [{ ...result, output: { type: "text", value: "Rain, 7 degrees." } }] },
      ],
    });
    check(after.usage.inputTokens > first.usage.inputTokens, "the result is not in the prompt");
    const streamed = streamText({ ...common, prompt: question, tools, toolChoice: "required" });
    const calls = await streamed.toolCalls;
    check(JSON.stringify(calls[0]?.input) === JSON.stringify(call.input), "the streamed call is not the whole one");
  },
  parse: async () => {
    const schema = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(150) });
    const { object } = await generateObject({ ...common, schema, prompt: "What is helexa?" });
    check(Number.isInteger(object.age), JSON.stringify(object));
  },
  errors: async () => {
    try {
      await generateText({ ...common, model: named("no-such-model"), prompt: "Hello" });
    } catch (error) {
      check(error.statusCode === 404 && error.message.includes("no-such-model"), `${error.statusCode}: ${error.message}`);
      return;
    }
    check(false, "an unknown model is answered");
  },
};

const outcomes = {};
for (const [feature, run] of Object.entries(features)) {
  try {
    await run();
    outcomes[feature] = "pass";
  } catch (error) {
    outcomes[feature] = `FAIL: ${String(error?.message ?? error).slice(0, 300)}`;
  }
}
console.log(JSON.stringify(outcomes));
