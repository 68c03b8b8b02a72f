// Names in Redis.

export const PREFIX = 'baseline:node';
export const JOURNAL = `${PREFIX}:journal`;
export const GROUP = 'postgresql';
export const key = (sale, what) => `${PREFIX}:{${sale}}:${what}`;
