// Greedy tokens of llama.cpp: node llama.mjs NODE_LLAMA_CPP JOBS, where JOBS is a JSON file of
// [{model, lora, prompts, texts, tokens}]; prints [{answers, tokenized}] as JSON.
import fs from "node:fs";
import {pathToFileURL} from "node:url";

const [library, file] = process.argv.slice(2);
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(library).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const results = [];
for (const job of JSON.parse(fs.readFileSync(file, "utf8"))) {
    const model = await llama.loadModel({modelPath: job.model, gpuLayers: 0});
    const tokenized = job.texts.map((text) => [...model.tokenize(text, true)]);
    const lora = job.lora === null ? {} : {lora: {adapters: [{filePath: job.lora}]}};
    const context = await model.createContext({contextSize: 256, batchSize: 256, threads: 1, ...lora});
    const answers = [];
    for (const prompt of job.prompts) {
        const sequence = context.getSequence();
        const answer = [];
        for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
            answer.push(token);
            if (answer.length >= job.tokens)
                break;
        }
        sequence.dispose();
        answers.push(answer);
    }
    results.push({answers, tokenized});
    await context.dispose();
    await model.dispose();
}
process.stdout.write(JSON.stringify(results), () => process.exit(0)); // a pipe takes 64 KiB at a time
