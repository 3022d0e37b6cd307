/**
 * `test` for both runtimes: `Deno.test` in Deno, `node:test` in Node.
 *
 * @module
 */
// deno-lint-ignore-file no-explicit-any

type Body = () => void | Promise<void>;

interface Test {
  (name: string, body: Body): void;
  /** Counts as skipped; `reason` says why and what would run it. */
  skip(name: string, reason: string): void;
}

const deno = (globalThis as any).Deno;

async function make(): Promise<Test> {
  if (deno?.test) {
    const run = ((name: string, body: Body) => deno.test(name, body)) as Test;
    run.skip = (name, reason) =>
      deno.test({
        name: `${name} (skipped: ${reason})`,
        ignore: true,
        fn() {},
      });
    return run;
  }
  const node = await import("node:test");
  const run = ((name: string, body: Body) => {
    node.test(name, async () => await body());
  }) as Test;
  run.skip = (name, reason) => {
    node.test(name, { skip: reason }, () => {});
  };
  return run;
}

export const test: Test = await make();

/** Whether this is Node; tests name by it what a runtime cannot do. */
export const isNode: boolean = deno === undefined;
