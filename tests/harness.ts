/**
 * `test` for both runtimes: `Deno.test` in Deno, `node:test` in Node.
 *
 * @module
 */
// deno-lint-ignore-file no-explicit-any

type Body = () => void | Promise<void>;

interface Test {
  /** Fails when `body` has not ended after `limitSeconds`; 300 unless given. */
  (name: string, body: Body, limitSeconds?: number): void;
  /** Counts as skipped; `reason` says why and what would run it. */
  skip(name: string, reason: string): void;
}

const deno = (globalThis as any).Deno;

/** A test that waits for what never comes fails, and the others still run. */
function limited(body: Body, limitSeconds = 300): () => Promise<void> {
  return async () => {
    let timer: ReturnType<typeof setTimeout> | undefined;
    const limit = new Promise<never>((_, reject) => {
      const end = () => reject(new Error(`not done in ${limitSeconds} s`));
      timer = setTimeout(end, limitSeconds * 1000);
    });
    try {
      await Promise.race([body(), limit]);
    } finally {
      clearTimeout(timer);
    }
  };
}

async function make(): Promise<Test> {
  if (deno?.test) {
    const run = ((name: string, body: Body, limitSeconds?: number) =>
      deno.test(name, limited(body, limitSeconds))) as Test;
    run.skip = (name, reason) =>
      deno.test({
        name: `${name} (skipped: ${reason})`,
        ignore: true,
        fn() {},
      });
    return run;
  }
  const node = await import("node:test");
  const run = ((name: string, body: Body, limitSeconds?: number) => {
    node.test(name, limited(body, limitSeconds));
  }) as Test;
  run.skip = (name, reason) => {
    node.test(name, { skip: reason }, () => {});
  };
  return run;
}

export const test: Test = await make();

/** Whether this is Node; tests name by it what a runtime cannot do. */
export const isNode: boolean = deno === undefined;
