// `deno task build`: the native core and ffi/abi.gen.ts.
import { buildCore, installPackages, main } from "./setup.mjs";

await main(async () => {
  await installPackages();
  await buildCore();
  return 0;
});
