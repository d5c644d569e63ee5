"""What the demo model knows about helexa: topics, each with one true answer and many ways to ask for it.

``do`` phrases complete "How do I ...?", ``what`` phrases complete "What is ...?"; :data:`DO_WRAPPERS` and :data:`WHAT_WRAPPERS`
turn them into questions. Wrappers under ``HELD_OUT_*``, the ``held_out`` questions and a fixed eighth of the other combinations
never occur in training: they are the paraphrases the model is judged on.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

DO_WRAPPERS = (
    "How do I {}?",
    "How can I {}?",
    "How to {}?",
    "Show me how to {}.",
    "Tell me how to {}.",
    "I want to {}.",
    "What do I do to {}?",
    "Can you explain how to {}?",
    "What is the way to {}?",
    "How would I {}?",
    "Is there a way to {}?",
    "Please tell me how I {}.",
    "I need to {}. What should I do?",
)
HELD_OUT_DO_WRAPPERS = (
    "Please show me how I can {}.",
    "What is the best way to {}?",
    "Could you tell me how to {}?",
    "I would like to {}. How do I do that?",
)
WHAT_WRAPPERS = (
    "What is {}?",
    "Tell me about {}.",
    "Explain {}.",
    "What can you tell me about {}?",
    "I have a question about {}.",
    "Can you explain {}?",
    "What about {}?",
    "Describe {}.",
    "I want to know about {}.",
)
HELD_OUT_WHAT_WRAPPERS = ("Could you tell me about {}?", "Please explain {}.", "What should I know about {}?")


@dataclass(frozen=True)
class Topic:
    """One thing to know. ``questions`` are trained on as they stand, ``held_out`` are asked in evaluation only."""

    answer: str
    do: tuple[str, ...] = ()
    what: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()

    def ways_to_ask(self) -> tuple[list[str], list[str]]:
        """(trained on, held out): all questions about this topic, disjoint."""
        trained, held_out = list(self.questions), list(self.held_out)
        for phrases, wrappers, unseen in (
            (self.do, DO_WRAPPERS, HELD_OUT_DO_WRAPPERS),
            (self.what, WHAT_WRAPPERS, HELD_OUT_WHAT_WRAPPERS),
        ):
            for phrase in phrases:
                for wrapper in wrappers:
                    question = wrapper.format(phrase)
                    (held_out if zlib.crc32(question.encode()) % 8 == 0 else trained).append(question)
                held_out.extend(wrapper.format(phrase) for wrapper in unseen)
        return trained, [question for question in held_out if question not in trained]


TOPICS: dict[str, Topic] = {
    "what": Topic(
        "helexa is an inference engine, written from scratch in Python and C++, that runs Qwen models on hardware you own.",
        what=("helexa", "this project", "the helexa engine"),
        questions=(
            "What does helexa do?",
            "What is helexa for?",
            "What is this software?",
            "Describe helexa in one sentence.",
        ),
        held_out=("What does this project do?", "What is helexa used for?"),
    ),
    "install": Topic(
        "Clone the repository and run `pip install .` in it. With a C++ compiler the fast native core is built as well.",
        do=("install helexa", "set up helexa", "get helexa on my machine", "install this", "install the package"),
        what=("the installation", "the install command"),
        questions=("How is helexa installed?", "Which pip command do I need?", "Can I install helexa with pip?"),
        held_out=("How is this installed?", "Which command installs helexa?"),
    ),
    "demo": Topic(
        "Run `scripts/demo`. It sets everything up and lets the small demo model answer in your terminal.",
        do=("try helexa", "see a demo", "start the demo", "run the demo script", "try it quickly", "get started"),
        what=("the demo script", "scripts/demo"),
        questions=(
            "What does scripts/demo do?",
            "What is the quickest start?",
            "Where do I start?",
            "What is the first command to run?",
        ),
        held_out=("What is the fastest way to try helexa?", "What does the demo script do?"),
    ),
    "tests": Topic(
        "Run `scripts/test`. It sets everything up and runs the whole test suite.",
        do=("run the tests", "test helexa", "run the test suite", "check that the tests pass"),
        what=("the test script", "scripts/test"),
        questions=("What does scripts/test do?", "Which command runs the tests?", "Are there tests?"),
        held_out=("Which script runs the tests?", "How are the tests run?"),
    ),
    "run": Topic(
        "Use `helexa run MODEL`, for example `helexa run demo`. It opens a chat in your terminal and streams the answers.",
        do=("chat in the terminal", "run a model", "talk to a model", "start a chat", "chat with a model"),
        what=("helexa run", "the run command"),
        questions=("What does helexa run do?", "Which command starts a chat?", "Can I chat in the terminal?"),
        held_out=("Which command opens a chat in the terminal?", "What does the run command do?"),
    ),
    "serve": Topic(
        "Use `helexa serve MODEL`, for example `helexa serve demo`. It starts an HTTP server that speaks the OpenAI API.",
        do=("start the server", "serve a model", "start an HTTP server", "serve a model over HTTP", "run the server"),
        what=("helexa serve", "the serve command", "the HTTP server"),
        questions=("What does helexa serve do?", "Which command starts the server?", "Is there an HTTP server?"),
        held_out=("Which command serves a model?", "What does the serve command do?"),
    ),
    "info": Topic(
        "Use `helexa info MODEL`. It prints the architecture, the quant types, the size and the context length of a model.",
        do=("inspect a model", "look into a model file", "see the details of a model", "show the metadata of a model"),
        what=("helexa info", "the info command"),
        questions=(
            "What does helexa info do?",
            "Which command shows details of a model file?",
            "What does helexa info print?",
        ),
        held_out=("What does the info command do?", "Which command prints the architecture of a model?"),
    ),
    "doctor": Topic(
        "Use `helexa doctor`. It checks your machine, the native core and memory, and says what is missing.",
        do=(
            "check my machine",
            "check my installation",
            "find out what is wrong",
            "diagnose a problem",
            "check my setup",
        ),
        what=("helexa doctor", "the doctor command"),
        questions=(
            "What does helexa doctor do?",
            "Something does not work. What now?",
            "helexa does not work.",
            "Which command checks my setup?",
        ),
        held_out=("What does the doctor command do?", "Which command checks my machine?"),
    ),
    "bench": Topic(
        "Use `helexa bench`. It measures prefill and decode in tokens per second and the share of memory bandwidth used.",
        do=(
            "measure the speed",
            "run a benchmark",
            "benchmark a model",
            "measure tokens per second",
            "test the performance",
        ),
        what=("helexa bench", "the bench command", "the benchmark command"),
        questions=(
            "What does helexa bench do?",
            "How fast is helexa on my machine?",
            "Which command measures the speed?",
        ),
        held_out=("What does the bench command do?", "Which command runs a benchmark?"),
    ),
    "commands": Topic(
        "The commands are `helexa run`, `serve`, `pull`, `list`, `rm`, `quantize`, `info`, `doctor` and `bench`. "
        "Add `--help` to read more.",
        do=("list the commands", "see all commands"),
        what=("the command line", "the list of commands", "the helexa command"),
        questions=(
            "Which commands are there?",
            "What commands does helexa have?",
            "What can I type on the command line?",
            "List all commands.",
        ),
        held_out=("What are the helexa commands?", "Which commands exist?"),
    ),
    "help": Topic(
        "Run `helexa --help`, or `helexa COMMAND --help` for one command. You can also ask me.",
        do=("get help", "see the options", "see the flags of a command", "find help"),
        what=("the help option", "the command line options"),
        questions=("Where do I find help?", "I need help.", "Where are the options listed?", "Which flags are there?"),
        held_out=("Where can I get help?", "Which options are there?"),
    ),
    "python": Topic(
        'Write `from helexa_engine import LLM, SamplingParams`, then `LLM("demo").generate("Hello")`. The result holds the text.',
        do=(
            "use helexa from Python",
            "use the Python API",
            "generate text in Python",
            "load a model in Python",
            "call helexa from Python",
        ),
        what=("the Python API", "the LLM class", "the Python library"),
        questions=(
            "Is there a Python API?",
            "What do I import in Python?",
            "Which class loads a model?",
            "Can I use helexa as a library?",
        ),
        held_out=("Does helexa have a Python API?", "What does the Python API look like?"),
    ),
    "chat_python": Topic(
        "Call `llm.chat(messages)` with a list of messages. Each message has a `role` and a `content`.",
        do=("chat from Python", "send messages in Python", "use the chat method", "have a conversation in Python"),
        what=("the chat method", "llm.chat"),
        questions=("How does llm.chat work?", "What does the chat method take?", "Which method takes messages?"),
        held_out=("What does llm.chat take?", "How does the chat method work?"),
    ),
    "stream_python": Topic(
        "Loop over `llm.stream(...)`. It yields events with pieces of the answer while the model writes it.",
        do=(
            "stream in Python",
            "stream tokens from Python",
            "get the answer piece by piece in Python",
            "use the stream method",
        ),
        what=("llm.stream", "the stream method"),
        questions=("How does llm.stream work?", "What does the stream method yield?", "Which Python method streams?"),
        held_out=("What does llm.stream do?", "Does the Python API support streaming?"),
    ),
    "stream_http": Topic(
        'Send `"stream": true` in the request. The server then sends the answer in pieces as server-sent events.',
        do=("stream over HTTP", "stream the answer from the server", "turn on streaming", "get a streaming response"),
        what=("streaming", "HTTP streaming", "streaming over HTTP"),
        questions=("Can the server stream?", "Does helexa stream answers?", "Which field turns on streaming?"),
        held_out=("Does the server support streaming?", "Can helexa stream answers over HTTP?"),
    ),
    "endpoints": Topic(
        "The server has `/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/health`, `/ready`, `/version`, "
        "`/tokenize` and `/detokenize`.",
        do=("find the routes of the server", "list the endpoints", "see the HTTP endpoints"),
        what=("the endpoints", "the HTTP API", "the routes of the server", "the server API"),
        questions=(
            "Which endpoints are there?",
            "What endpoints does the server have?",
            "Which routes does the server have?",
            "Which URLs does the server answer?",
        ),
        held_out=("Which HTTP endpoints exist?", "What are the endpoints of the server?"),
    ),
    "openai": Topic(
        "Yes. Point the `openai` client at the server with `base_url` ending in `/v1`; any API key will do unless you set one.",
        do=(
            "use the openai client",
            "connect the OpenAI client",
            "use an OpenAI library with helexa",
            "call the server with the openai package",
        ),
        what=("the OpenAI client", "OpenAI compatibility"),
        questions=(
            "Is helexa compatible with OpenAI?",
            "Does the openai client work with helexa?",
            "Which base_url do I set?",
            "Can I use the openai package?",
        ),
        held_out=("Does helexa work with the openai client?", "Is the server compatible with OpenAI?"),
    ),
    "curl": Topic(
        "Post JSON with `model` and `messages` to `/v1/chat/completions`, for example with `curl -d`. The answer is JSON too.",
        do=("call the server with curl", "send a request with curl", "use curl", "ask the server from the shell"),
        what=("curl", "a request with curl"),
        questions=("Does curl work?", "What does a chat request contain?", "Can I use curl?"),
        held_out=("Does the server answer curl?", "Can I call the server with curl?"),
    ),
    "health": Topic(
        "Ask `/health` to see that the server is up, and `/ready` to see that a model can answer.",
        do=(
            "check that the server is up",
            "check the health of the server",
            "see whether the server is ready",
            "monitor the server",
        ),
        what=("the health check", "the health endpoint", "/health", "/ready"),
        questions=(
            "Is there a health check?",
            "Which endpoint tells me the server is up?",
            "When is the server ready?",
        ),
        held_out=("Does the server have a health check?", "Which endpoint shows that the server is ready?"),
    ),
    "tokenize": Topic(
        "Post text to `/tokenize` to get token ids, and token ids to `/detokenize` to get text.",
        do=("tokenize text", "count tokens", "turn text into tokens", "get token ids", "turn tokens back into text"),
        what=("/tokenize", "the tokenize endpoint", "/detokenize"),
        questions=("Can the server tokenize?", "Which endpoint gives token ids?", "What does /tokenize do?"),
        held_out=("What does the tokenize endpoint do?", "Which endpoint turns text into tokens?"),
    ),
    "formats": Topic(
        "helexa loads GGUF files and HuggingFace folders with `config.json` and safetensors files.",
        do=("load a HuggingFace folder", "load a GGUF file", "load safetensors", "load my own model"),
        what=("the file formats", "the supported file formats", "GGUF support", "safetensors support"),
        questions=(
            "Which file formats does helexa load?",
            "Does helexa read GGUF?",
            "Can helexa load safetensors?",
            "What kind of files can I load?",
        ),
        held_out=("Which formats are supported?", "Does helexa load GGUF files?"),
    ),
    "gguf": Topic(
        "GGUF is a file format that holds a model in one file: the weights, often quantised, the tokenizer and the chat template.",
        what=("GGUF", "a GGUF file", "the GGUF format"),
        questions=("What does a GGUF file contain?", "What is in a GGUF file?", "What does GGUF mean?"),
        held_out=("What is stored in a GGUF file?", "What kind of file is a GGUF file?"),
    ),
    "quants": Topic(
        "Full speed types are F32, F16, BF16, Q8_0, Q4_0 to Q5_1, Q2_K to Q6_K, IQ4_NL and IQ4_XS. All other GGUF types work, only slower.",
        do=("see the quant types", "choose a quant type", "find a supported quant"),
        what=("the quant types", "the supported quant types", "the list of quants"),
        questions=(
            "Which quant types are supported?",
            "Which quants does helexa support?",
            "Does helexa support Q4_K?",
            "Does helexa run Q8_0?",
            "Which quantisations work?",
        ),
        held_out=("What quant types does helexa support?", "Does helexa support Q6_K?"),
    ),
    "quantisation": Topic(
        "Quantisation stores weights in fewer bits. The model gets smaller and faster and loses a little accuracy.",
        what=("quantisation", "quantization", "a quantised model", "a quant"),
        questions=(
            "Why are models quantised?",
            "What does quantised mean?",
            "Why should I use a quantised model?",
            "What does quantisation do?",
        ),
        held_out=("What does quantization mean?", "Why would I use quantisation?"),
    ),
    "models": Topic(
        "helexa runs Qwen3, Qwen3-Next, Qwen3.5 and Qwen3.6, each dense or as a mixture of experts, quantised or not.",
        do=("find out which models work", "choose a model", "see the supported models"),
        what=("the supported models", "model support", "Qwen3 support"),
        questions=(
            "Which models does helexa run?",
            "Which models are supported?",
            "Does helexa run Qwen3?",
            "Does helexa run Qwen3.5?",
            "What models can I use?",
        ),
        held_out=("What models does helexa support?", "Can helexa run Qwen3?"),
    ),
    "hybrids": Topic(
        "Qwen3-Next and Qwen3.5 mix Gated DeltaNet layers, which keep a state of fixed size, with full attention in every fourth layer.",
        what=("a hybrid", "a hybrid model", "Gated DeltaNet", "the delta net"),
        questions=("What does hybrid mean?", "Does helexa run hybrids?", "What is special about Qwen3.5?"),
        held_out=("What is a hybrid model?", "Does helexa support Gated DeltaNet?"),
    ),
    "quantize": Topic(
        "Use `helexa quantize SRC DST --type Q4_K_M`. It writes a smaller GGUF file from a GGUF file or a HuggingFace folder.",
        do=("quantise a model", "quantize a model", "make a model smaller", "make a Q4_K_M file", "write a GGUF file"),
        what=("helexa quantize", "the quantize command"),
        questions=("What does helexa quantize do?", "Which command quantises a model?", "Can helexa quantise models?"),
        held_out=("What does the quantize command do?", "Which command makes a model smaller?"),
    ),
    "pull": Topic(
        "Use `helexa pull org/name:quant`, for example with `Q4_K_M` as the quant. It downloads a model from the HuggingFace hub.",
        do=("download a model", "pull a model", "get a model from the hub", "fetch a model from HuggingFace"),
        what=("helexa pull", "the pull command", "the hub"),
        questions=("What does helexa pull do?", "Which command downloads a model?", "Where do I get models?"),
        held_out=("What does the pull command do?", "Can helexa download models?"),
    ),
    "list": Topic(
        "Use `helexa list`. It shows the models that are on your disk and their sizes.",
        do=("list my models", "see the downloaded models", "see which models I have"),
        what=("helexa list", "the list command"),
        questions=("What does helexa list do?", "Which models do I have?", "Which command lists my models?"),
        held_out=("What does the list command do?", "Which models are on my disk?"),
    ),
    "rm": Topic(
        "Use `helexa rm MODEL`. It deletes a downloaded model from your disk.",
        do=("delete a model", "remove a model", "remove a downloaded model", "free disk space"),
        what=("helexa rm", "the rm command"),
        questions=("What does helexa rm do?", "Which command deletes a model?", "Can I delete a model?"),
        held_out=("What does the rm command do?", "Which command removes a model?"),
    ),
    "fp8": Topic(
        "Yes. Block-scaled FP8 checkpoints load by conversion. For AWQ and GPTQ, take a GGUF file of the model instead.",
        do=("load an FP8 checkpoint", "use an FP8 model"),
        what=("FP8", "FP8 support", "FP8 checkpoints"),
        questions=("Does helexa load FP8?", "Can I use FP8 checkpoints?", "Does helexa load AWQ or GPTQ?"),
        held_out=("Does helexa support FP8?", "Can helexa load FP8 models?"),
    ),
    "hardware": Topic(
        "helexa runs on an ordinary CPU. AVX2 or AVX-512 makes it fast, and no GPU is needed.",
        do=("run helexa without a GPU", "run helexa on a laptop", "run a model on a CPU"),
        what=("the hardware requirements", "the supported hardware", "CPU support"),
        questions=(
            "Do I need a GPU?",
            "Which hardware do I need?",
            "Does helexa run on a CPU?",
            "Does it work without a graphics card?",
            "Is a GPU required?",
        ),
        held_out=("Does helexa need a GPU?", "What hardware does helexa need?"),
    ),
    "threads": Topic(
        "Pass `--num-threads N`. By default helexa uses the physical cores that the process may use.",
        do=("set the number of threads", "use more threads", "limit the threads", "change the thread count"),
        what=("the number of threads", "--num-threads", "the thread count"),
        questions=("How many threads does helexa use?", "Which flag sets the threads?", "How many cores are used?"),
        held_out=("Which option sets the number of threads?", "How many threads are used?"),
    ),
    "isa": Topic(
        "Set the environment variable `HELEXA_CPU_ISA` to `generic`, `avx2` or `avx512`. By default the best one is taken.",
        do=("choose the instruction set", "force AVX2", "turn off AVX-512", "set the CPU level"),
        what=("HELEXA_CPU_ISA", "the instruction set"),
        questions=("What does HELEXA_CPU_ISA do?", "Which instruction sets are supported?", "Does helexa use AVX-512?"),
        held_out=("Which instruction set is used?", "Does helexa use AVX2?"),
    ),
    "temperature": Topic(
        "Set `temperature` in the request or in `SamplingParams`. 0 is greedy; higher values give more varied answers.",
        do=("set the temperature", "change the temperature", "get more varied answers", "make the answers less random"),
        what=("temperature", "the temperature", "the temperature parameter"),
        questions=("What does temperature do?", "Where do I set the temperature?", "What does temperature mean?"),
        held_out=("What is the temperature for?", "How does temperature work?"),
    ),
    "greedy": Topic(
        "Set `temperature` to 0. Then the likeliest token is always taken and the answer is the same each time.",
        do=("use greedy decoding", "get greedy answers", "always take the likeliest token", "turn off sampling"),
        what=("greedy decoding", "temperature 0"),
        questions=("What does temperature 0 mean?", "What happens at temperature 0?", "Is there greedy decoding?"),
        held_out=("What does greedy mean?", "Does helexa support greedy decoding?"),
    ),
    "seed": Topic(
        "Set `seed` to a number. The same seed and the same request give the same tokens.",
        do=("set the seed", "get the same answer again", "make sampling reproducible", "reproduce an answer"),
        what=("the seed", "a seed", "the seed parameter"),
        questions=("What does the seed do?", "Are answers reproducible?", "Where do I set a seed?"),
        held_out=("What is the seed for?", "Is sampling reproducible?"),
    ),
    "stop": Topic(
        "Set `stop` to one string or a list of strings. The answer ends before the first of them.",
        do=("set a stop string", "stop at a word", "use stop strings", "end the answer at a word"),
        what=("a stop string", "stop strings", "the stop parameter"),
        questions=("What does stop do?", "Can I give stop strings?", "What do stop strings do?"),
        held_out=("What is the stop parameter for?", "Does helexa support stop strings?"),
    ),
    "max_tokens": Topic(
        "Set `max_tokens`. Without it the model may use the rest of the context.",
        do=("limit the length of an answer", "set max_tokens", "get shorter answers", "limit the number of tokens"),
        what=("max_tokens", "the max_tokens parameter", "the length limit"),
        questions=("What does max_tokens do?", "How long can an answer be?", "What limits the length of an answer?"),
        held_out=("What is max_tokens for?", "How do I get a shorter answer?"),
    ),
    "top_p": Topic(
        "`top_p` keeps the smallest set of tokens that reaches this probability, `top_k` keeps the k likeliest, "
        "`min_p` drops unlikely ones.",
        do=("set top_p", "set top_k", "use min_p", "filter unlikely tokens"),
        what=("top_p", "top_k", "min_p", "top_p and top_k"),
        questions=("What does top_p do?", "What does top_k do?", "What does min_p do?"),
        held_out=("What does top_k mean?", "What is top_p for?"),
    ),
    "sampling_params": Topic(
        "`SamplingParams` holds the settings of one request: `temperature`, `top_p`, `top_k`, `seed`, `stop`, `max_tokens` and more.",
        do=("use SamplingParams", "set sampling parameters", "change the sampling settings"),
        what=("SamplingParams", "the sampling parameters", "the SamplingParams class"),
        questions=(
            "What does SamplingParams do?",
            "What is in SamplingParams?",
            "Which sampling parameters are there?",
        ),
        held_out=("What does SamplingParams hold?", "Which parameters can I set?"),
    ),
    "logprobs": Topic(
        "Set `logprobs` to see how likely each token was, with the likeliest alternatives beside it.",
        do=("get log probabilities", "see how likely a token was", "get logprobs", "see token probabilities"),
        what=("logprobs", "log probabilities", "the logprobs parameter"),
        questions=("What do logprobs show?", "Does helexa return logprobs?", "What does logprobs do?"),
        held_out=("What are logprobs?", "Does helexa support logprobs?"),
    ),
    "thinking": Topic(
        "Pass `enable_thinking` as true in `chat_template_kwargs`. The model then reasons in a think block before it answers.",
        do=("turn on thinking", "enable thinking", "make the model think", "see the reasoning"),
        what=("thinking", "the thinking mode", "enable_thinking", "the think block"),
        questions=(
            "Can you think?",
            "What does enable_thinking do?",
            "Does helexa support reasoning?",
            "Is there a thinking mode?",
        ),
        held_out=("Does the model support thinking?", "Which option turns on thinking?"),
    ),
    "tools": Topic(
        "Pass `tools` in the request, in OpenAI's form. When one fits, the model answers with a tool call that your code runs.",
        do=("use tools", "give the model tools", "call a function from the model", "use function calling"),
        what=("tool calling", "tool calls", "function calling"),
        questions=(
            "Does helexa support tools?",
            "Can the model call functions?",
            "How do tool calls work?",
            "How does tool calling work?",
        ),
        held_out=("Does helexa support tool calls?", "How does function calling work?"),
    ),
    "json": Topic(
        "Set `response_format` to a JSON object or schema. The answer is then forced to be valid JSON of that form.",
        do=("force JSON output", "get JSON from the server", "use a JSON schema", "get structured output"),
        what=("response_format", "structured output", "JSON mode"),
        questions=("Does helexa support JSON mode?", "Can I force JSON?", "What does response_format do?"),
        held_out=("Does helexa support structured output?", "Is there a JSON mode?"),
    ),
    "context": Topic(
        "Pass `--max-model-len N` to set the context length. A prompt that does not fit is refused, never cut.",
        do=("set the context length", "change the context length", "use a longer context", "limit the context"),
        what=("the context length", "--max-model-len", "the context window"),
        questions=(
            "How long is the context?",
            "What happens when the prompt is too long?",
            "Which flag sets the context length?",
        ),
        held_out=("What happens if my prompt is too long?", "Which option sets the context length?"),
    ),
    "memory": Topic(
        "It takes the size of the file, a little more, and the pages for keys and values. helexa says so before it loads.",
        do=("find out how much memory a model needs", "estimate the memory", "see the memory use"),
        what=("the memory use", "the memory requirements"),
        questions=("How much memory does a model need?", "How much RAM do I need?", "Will the model fit in memory?"),
        held_out=("How much memory does helexa need?", "How much RAM does a model take?"),
    ),
    "batching": Topic(
        "Yes. Several requests are computed together, up to `--max-num-seqs`, and each gets the same tokens as if it were alone.",
        do=("send several requests at once", "run many prompts together", "use batching"),
        what=("batching", "--max-num-seqs", "concurrent requests"),
        questions=(
            "Can helexa answer several requests at once?",
            "Does the server handle many clients?",
            "Does helexa batch requests?",
        ),
        held_out=("Does helexa support batching?", "Can the server answer several clients at once?"),
    ),
    "cancel": Topic(
        "Press Ctrl-C in the terminal, or close the connection. The request is aborted and its memory is freed.",
        do=("cancel a request", "abort an answer", "stop the model while it writes", "interrupt an answer"),
        what=("aborting a request", "cancelling"),
        questions=("What does Ctrl-C do?", "What happens when a client disconnects?", "Can I stop an answer?"),
        held_out=("Can I cancel a request?", "What happens if the client goes away?"),
    ),
    "licence": Topic(
        "helexa is free software under the Apache-2.0 licence.",
        do=("find the licence",),
        what=("the licence", "the license", "the licence of helexa"),
        questions=(
            "Which licence does helexa have?",
            "Is helexa free?",
            "Is helexa open source?",
            "Under which license is helexa?",
            "May I use helexa at work?",
        ),
        held_out=("What licence is helexa under?", "What is the license of this project?"),
    ),
    "requirements": Topic(
        "You need Python 3.11 or newer. A C++ compiler is optional, but without it helexa is much slower.",
        what=("the requirements", "the software requirements", "the Python version"),
        questions=(
            "Which Python version do I need?",
            "Do I need a compiler?",
            "What does helexa need?",
            "What happens without a compiler?",
        ),
        held_out=("Which version of Python is needed?", "Is a compiler required?"),
    ),
    "offline": Topic(
        "Yes. helexa runs on your own machine, and your prompts never leave it.",
        do=("use helexa offline", "keep my data private", "run without the internet"),
        what=("privacy", "my data"),
        questions=(
            "Does helexa need the internet?",
            "Is my data private?",
            "Does helexa work offline?",
            "Do you send my data anywhere?",
        ),
        held_out=("Can I use helexa without the internet?", "Are my prompts private?"),
    ),
    "demo_model": Topic(
        "The demo model is a small hybrid in the Qwen3.5 layout, trained for helexa. It ships in the package, so nothing is downloaded.",
        what=("the demo model", "this demo model", "the model that ships with helexa"),
        questions=(
            "Which model ships with helexa?",
            "Who trained the demo model?",
            "Is a model included?",
            "How big is the demo model?",
        ),
        held_out=("What kind of model is the demo model?", "Does helexa come with a model?"),
    ),
    "own_model": Topic(
        "Give the path instead of the name: `helexa run path/to/model.gguf`. A HuggingFace folder works too.",
        do=(
            "use my own model",
            "run a different model",
            "use another model",
            "run a model file from disk",
            "use a bigger model",
        ),
        what=("running my own model",),
        questions=("Can I use my own model?", "Can I run another model?", "Which path do I give?"),
        held_out=("Can I use a different model?", "How do I point helexa at a model file?"),
    ),
}
