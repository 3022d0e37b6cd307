// One long step of the set-up: a command that says what it does and how long
// that takes, is quiet while all is well, and shows its output when it fails.
import { spawn } from "node:child_process";

/** What cannot be done here, said in one sentence with the way out. */
export class SetupError extends Error {
  /** @param {string} sentence @param {string} [output] what the command said */
  constructor(sentence, output = "") {
    super(sentence);
    this.name = "SetupError";
    this.output = output;
  }
}

/** Steps that end sooner than this say nothing at all. */
const SILENT_MS = 700;
const HEARTBEAT_MS = 15_000;

/**
 * Runs a command and resolves with its standard output.
 *
 * @param {string} title e.g. "Installing npm packages"
 * @param {string} expected e.g. "about 30 s"
 * @param {string[]} command the program and its arguments
 * @param {{ cwd?: string, env?: Record<string, string>, remedy?: string }} [options]
 *   `remedy` ends the sentence of a failure: what to run by hand
 * @returns {Promise<string>}
 */
export async function step(title, expected, command, options = {}) {
  const began = performance.now();
  const seconds = () => Math.round((performance.now() - began) / 1000);
  let announced = false;
  const announce = setTimeout(() => {
    announced = true;
    console.error(`${title} (${expected}) ...`);
  }, SILENT_MS);
  const heartbeat = setInterval(
    () => console.error(`${title}: ${seconds()} s so far`),
    HEARTBEAT_MS,
  );
  try {
    const output = await capture(command, options);
    if (announced) console.error(`${title}: done in ${seconds()} s`);
    return output;
  } catch (error) {
    if (!(error instanceof SetupError)) throw error;
    const remedy = options.remedy ?? `run by hand: ${command.join(" ")}`;
    throw new SetupError(
      `${title} failed: ${error.message}; ${remedy}`,
      error.output,
    );
  } finally {
    clearTimeout(announce);
    clearInterval(heartbeat);
  }
}

/**
 * @param {string[]} command
 * @param {{ cwd?: string, env?: Record<string, string> }} options
 * @returns {Promise<string>}
 */
export function capture([program, ...args], options = {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, {
      cwd: options.cwd,
      env: { ...process.env, ...options.env },
      // No terminal: a program that would ask must fail instead of waiting.
      stdio: ["ignore", "pipe", "pipe"],
    });
    let output = "";
    let everything = "";
    child.stdout.on("data", (chunk) => {
      output += chunk;
      everything += chunk;
    });
    child.stderr.on("data", (chunk) => everything += chunk);
    child.on("error", (error) => {
      reject(
        new SetupError(
          error.code === "ENOENT"
            ? `${program} is not installed`
            : error.message,
        ),
      );
    });
    child.on("close", (code, signal) => {
      if (code === 0) return resolve(output);
      const how = signal ? `ended by ${signal}` : `exit code ${code}`;
      reject(new SetupError(`${program}: ${how}`, everything));
    });
  });
}
