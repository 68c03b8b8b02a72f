// A flash sale the way it is usually built in Node: as many workers as cores answer requests
// (server.js), one more moves the journal to PostgreSQL (worker.js), and this process starts them,
// makes the stock and takes it away again.

import cluster from 'node:cluster';
import { readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { parseArgs } from 'node:util';
import { Redis } from 'ioredis';
import pg from 'pg';

import { GROUP, JOURNAL, PREFIX, key } from './keys.js';
import { serve } from './server.js';
import { work } from './worker.js';

const SCHEMA = 'baseline_node';

const { values: options } = parseArgs({
  options: {
    listen: { type: 'string', default: '127.0.0.1:0' },
    sale: { type: 'string', multiple: true, default: [] },
    limit: { type: 'string', default: '1' },
    'redis-url': { type: 'string' },
    'database-url': { type: 'string' },
    workers: { type: 'string', default: process.env.BASELINE_WORKERS ?? String(availableParallelism()) },
  },
});
const secret = process.env.STOCKADE_JWT_SECRET;
const redisUrl = options['redis-url'];
const databaseUrl = options['database-url'];

const clear = async (redis, database) => {
  const keys = await redis.keys(`${PREFIX}:*`);
  if (keys.length > 0) await redis.unlink(keys);
  await database.query(`DROP SCHEMA IF EXISTS ${SCHEMA} CASCADE`);
};

const main = async () => {
  const redis = new Redis(redisUrl);
  const database = new pg.Client({ connectionString: databaseUrl });
  await database.connect();
  await clear(redis, database);
  const tables = readFileSync(new URL('../postgres.sql', import.meta.url), 'utf8');
  await database.query(`CREATE SCHEMA ${SCHEMA}; SET search_path = ${SCHEMA}; ${tables}`);
  for (const sale of options.sale) {
    const [id, stock] = sale.split('=');
    await redis.hset(key(id, 'sale'), { remaining: stock, limit: options.limit, opens_ms: 0 });
  }
  await redis.xgroup('CREATE', JOURNAL, GROUP, '0', 'MKSTREAM');

  cluster.fork({ BASELINE_ROLE: 'worker' });
  let listening = 0;
  cluster.on('listening', (_, { address, port }) => {
    listening += 1;
    if (listening === Number(options.workers)) console.log(`http://${address}:${port}`);
  });
  for (let n = 0; n < Number(options.workers); n += 1) cluster.fork({ BASELINE_ROLE: 'server' });

  let ending = false;
  const end = async (code) => {
    if (ending) return;
    ending = true;
    for (const worker of Object.values(cluster.workers)) worker.process.kill('SIGKILL');
    await clear(redis, database);
    process.exit(code);
  };
  // A worker that dies would make the figures mean something else.
  cluster.on('exit', () => end(1));
  // Nobody else would end it.
  const parent = process.ppid;
  setInterval(() => process.ppid === parent || end(0), 500).unref();
  process.on('SIGTERM', () => end(0));
  process.on('SIGINT', () => end(0));
};

if (cluster.isPrimary) {
  await main();
} else if (process.env.BASELINE_ROLE === 'worker') {
  await work({ redisUrl, databaseUrl, schema: SCHEMA });
} else {
  await serve({ listen: options.listen, redisUrl, secret });
}
