#!/usr/bin/env -S deno run --allow-all
/**
 * The command `vhost2`.
 *
 * @module
 */

import process from "node:process";
import { type Command, parseCommand } from "./arguments.ts";
import { help } from "./help.ts";
import { UsageError } from "./parsing.ts";
import { version } from "./version.ts";

/** Ends the process: 0 done, 1 it could not be done, 2 asked for wrongly. */
async function run(words: readonly string[]): Promise<number> {
  try {
    await perform(parseCommand(words));
    return 0;
  } catch (error) {
    const isUsage = error instanceof UsageError;
    const { message } = error as Error;
    const hint = isUsage ? ' (see "vhost2 --help")' : "";
    process.stderr.write(`vhost2: ${message}${hint}\n`);
    return isUsage ? 2 : 1;
  }
}

async function perform(command: Command): Promise<void> {
  switch (command.name) {
    case "help":
      return void process.stdout.write(help[command.about]);
    case "version":
      return void process.stdout.write(`vhost2 ${version}\n`);
  }
  if (command.name === "bind") {
    return (await import("./bind.ts")).bind(command.address, command.isBack);
  }
  // Only now: the core is loaded with it.
  const blk = await import("./blk.ts");
  const net = await import("./net.ts");
  const vdpa = await import("./vdpa.ts");
  switch (command.name) {
    case "blk":
      return await blk.serveBlk(command.arguments);
    case "net":
      return await net.serveNet(command.arguments);
    case "vdpa":
      return await vdpa.serveVdpa(command.arguments);
    case "capabilities": {
      const { capabilities } = command.of === "blk" ? blk : net;
      process.stdout.write(`${JSON.stringify(capabilities)}\n`);
    }
  }
}

process.exitCode = await run(process.argv.slice(2));
// Signal handlers would keep some runtimes going.
process.exit();
