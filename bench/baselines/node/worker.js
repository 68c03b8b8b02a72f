// Moves the journal to PostgreSQL: a batch, one INSERT, an acknowledgement. What was read and not
// acknowledged comes again, and is there already.

import { setTimeout as sleep } from 'node:timers/promises';
import { Redis } from 'ioredis';
import pg from 'pg';

import { GROUP, JOURNAL } from './keys.js';

const BATCH = 2000;
const BLOCK_MS = 200;
const INSERT = `INSERT INTO orders (id, sale_id, buyer_id, key, quantity, seq, accepted_at)
  SELECT id, sale_id, buyer_id, key, quantity, seq, to_timestamp(ms / 1000.0)
  FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::int[], $6::bigint[], $7::bigint[])
       AS new (id, sale_id, buyer_id, key, quantity, seq, ms)
  ON CONFLICT DO NOTHING`;

const drain = async (redis, database) => {
  let from = '0';
  for (;;) {
    const read = await redis.xreadgroup(
      'GROUP', GROUP, 'worker', 'COUNT', BATCH, 'BLOCK', BLOCK_MS, 'STREAMS', JOURNAL, from,
    );
    const entries = read?.[0]?.[1] ?? [];
    if (entries.length === 0) {
      // What an earlier failure left is done.
      from = '>';
      continue;
    }
    const columns = [[], [], [], [], [], [], []];
    const ids = [];
    for (const [id, [, sale, , buyer, , key, , order]] of entries) {
      ids.push(id);
      const [orderId, quantity, seq, ms] = order.split(' ');
      [orderId, sale, buyer, key, quantity, seq, ms].forEach((value, n) => columns[n].push(value));
    }
    await database.query({ name: 'insert', text: INSERT, values: columns });
    await redis.pipeline().xack(JOURNAL, GROUP, ...ids).xdel(JOURNAL, ...ids).exec();
  }
};

export const work = async ({ redisUrl, databaseUrl, schema }) => {
  // A connection of its own: the reads block.
  const redis = new Redis(redisUrl);
  const database = new pg.Client({
    connectionString: databaseUrl,
    options: `-c search_path=${schema}`,
  });
  await database.connect();
  for (;;) {
    try {
      await drain(redis, database);
    } catch (error) {
      console.error(`worker: ${error.message}`);
      await sleep(BLOCK_MS);
    }
  }
};
