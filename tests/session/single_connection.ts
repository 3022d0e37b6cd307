// A process with one target, for one connection: it has nothing else to do.

import process from "node:process";
import { registerTarget } from "../../mod.ts";
import { targetOptions } from "./served.ts";
import { Events } from "../support/wait.ts";
import { Recording } from "./recording.ts";

const target = await registerTarget({
  ...targetOptions(process.argv[2], new Recording(), new Events()),
  connect: true,
  reconnect: false,
  onError: (error) => {
    throw error;
  },
});
await target.closed;
