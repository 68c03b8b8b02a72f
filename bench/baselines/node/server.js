// The route: the token, the request, one script call, the answer.

import { readFileSync } from 'node:fs';
import { randomUUID } from 'node:crypto';
import Fastify from 'fastify';
import { createVerifier } from 'fast-jwt';
import { Redis } from 'ioredis';

import { JOURNAL, key } from './keys.js';

const PRICE_CENTS = 1999;
const HEADERS = {
  'x-request-id': '01a1ff7b-c1f1-7292-86aa-10d0bb798189',
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'content-security-policy': "default-src 'none'; frame-ancestors 'none'",
  'cache-control': 'no-store',
};
const STATUS = {
  unauthenticated: 401,
  idempotency_key_missing: 400,
  validation: 400,
  not_found: 404,
  idempotency_key_mismatch: 422,
  unavailable: 503,
};

const money = {
  type: 'object',
  properties: { amount: { type: 'integer' }, currency: { type: 'string' } },
};
// Answers are written by a function that Fastify compiles from this.
const schema = {
  params: { type: 'object', properties: { id: { type: 'string' } } },
  body: {
    type: 'object',
    required: ['quantity'],
    additionalProperties: false,
    properties: { quantity: { type: 'integer', minimum: 1 } },
  },
  response: {
    201: {
      type: 'object',
      properties: {
        id: { type: 'string' },
        sale_id: { type: 'string' },
        round: { type: 'integer' },
        buyer_id: { type: 'string' },
        quantity: { type: 'integer' },
        unit_price: money,
        total: money,
        status: { type: 'string' },
        seq: { type: 'integer' },
        accepted_at: { type: 'string' },
        durability: { type: 'string' },
      },
    },
  },
};

const problem = (reply, code) => {
  const status = STATUS[code] ?? 409;
  const outcome = status === 503 ? 'unknown' : 'not_applied';
  const retry = status === 503 ? 'same_key' : 'never';
  const body = { type: `/docs/problems/${code}`, title: code, status, code, outcome, retry };
  reply.code(status).headers(HEADERS).type('application/problem+json').send(JSON.stringify(body));
};

export const serve = async ({ listen, redisUrl, secret }) => {
  // What is called in one turn of the event loop travels in one write.
  const redis = new Redis(redisUrl, { enableAutoPipelining: true, commandTimeout: 5000 });
  const lua = readFileSync(new URL('../naive.lua', import.meta.url), 'utf8');
  redis.defineCommand('purchase', { numberOfKeys: 4, lua });
  const verify = createVerifier({
    key: secret,
    algorithms: ['HS256'],
    allowedIss: 'stockade',
    allowedAud: 'stockade',
    requiredClaims: ['exp', 'sub'],
  });

  const app = Fastify({ logger: false, keepAliveTimeout: 120_000, ajv: { customOptions: { coerceTypes: false, removeAdditional: false } } });
  app.setErrorHandler((error, _request, reply) => {
    problem(reply, error.statusCode >= 400 && error.statusCode < 500 ? 'validation' : 'unavailable');
  });
  app.get('/readyz', async () => '');
  app.post('/v1/sales/:id/orders', { schema }, async (request, reply) => {
    const { authorization, 'idempotency-key': idempotencyKey } = request.headers;
    let buyer;
    try {
      if (!authorization?.startsWith('Bearer ')) throw new Error('no token');
      buyer = verify(authorization.slice(7)).sub;
    } catch {
      problem(reply, 'unauthenticated');
      return reply;
    }
    if (!idempotencyKey || idempotencyKey.length > 255) {
      problem(reply, 'idempotency_key_missing');
      return reply;
    }
    const sale = request.params.id;
    const { quantity } = request.body;
    const [word, text] = await redis.purchase(
      key(sale, 'sale'), key(sale, 'buyers'), key(sale, 'orders'), JOURNAL,
      buyer, idempotencyKey, quantity, randomUUID(), Date.now(), sale,
    );
    if (word !== 'accepted' && word !== 'replayed') {
      problem(reply, word);
      return reply;
    }
    const [id, units, seq, acceptedMs] = text.split(' ');
    const ordered = Number(units);
    if (ordered !== quantity) {
      problem(reply, 'idempotency_key_mismatch');
      return reply;
    }
    reply.code(201).headers(HEADERS).header('location', `/v1/orders/${id}`);
    if (word === 'replayed') reply.header('idempotency-replayed', 'true');
    return {
      id,
      sale_id: sale,
      round: 1,
      buyer_id: buyer,
      quantity: ordered,
      unit_price: { amount: PRICE_CENTS, currency: 'EUR' },
      total: { amount: PRICE_CENTS * ordered, currency: 'EUR' },
      status: 'confirmed',
      seq: Number(seq),
      accepted_at: new Date(Number(acceptedMs)).toISOString(),
      durability: 'fsync',
    };
  });
  const colon = listen.lastIndexOf(':');
  await app.listen({ host: listen.slice(0, colon), port: Number(listen.slice(colon + 1)) });
};
