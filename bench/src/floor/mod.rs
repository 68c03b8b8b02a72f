//! What lies under everything: the bare script on a bare Redis, and `COPY` of the same rows into the
//! same table.

pub(crate) mod copy;
pub(crate) mod script;
