//! Refusals: one closed list of codes, each with everything there is to say about it, and the
//! RFC 9457 document that carries one to a client.

use std::{borrow::Cow, fmt, time::Duration};

use axum::{
    body::Body,
    http::{
        HeaderValue, StatusCode,
        header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    body::{BODY_BYTES_MAX, too_large},
    limit,
};
use crate::{
    domain::{
        limits::{ALLOCATION_MAX, CALL_DEADLINE_MS, WRITER_STALL_MS},
        order::Decision,
    },
    engine::{Answer, EngineError},
    sales::SaleError,
    store::StoreError,
    throttle::Exceeded,
};

/// The media type of a problem document.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// What a client may believe after a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The request changed nothing.
    NotApplied,
    /// It may have, or may still: only a retry with the same key tells.
    Unknown,
}

/// Whether the same request can succeed later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Retry {
    /// It cannot.
    Never,
    /// It can, with the same key.
    SameKey,
    /// It can, with the same key, but not before `Retry-After`.
    After,
}

/// What there is to know about a code.
#[derive(Clone, Copy, Debug)]
pub struct Meaning {
    /// The word in `code` and in the page's address.
    pub word: &'static str,
    /// The HTTP status; `validation` also occurs with 422.
    pub status: StatusCode,
    /// The same for every occurrence.
    pub title: &'static str,
    /// Unless the place that refuses knows better.
    pub retry: Retry,
    /// Unless the place that refuses knows better.
    pub outcome: Outcome,
    /// Why it happens.
    pub cause: &'static str,
    /// What to do about it.
    pub fix: &'static str,
    /// A request that gets it, or that mends it.
    pub curl: &'static str,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident $word:literal $status:ident $title:literal $retry:ident $outcome:ident
        cause $cause:literal fix $fix:literal curl $curl:literal)*) => {
        /// Every reason to refuse.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum Code {
            $($(#[$doc])* $code,)*
        }

        impl Code {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$code),*];

            /// What it means.
            pub const fn meaning(self) -> Meaning {
                match self {
                    $(Self::$code => Meaning {
                        word: $word,
                        status: StatusCode::$status,
                        title: $title,
                        retry: Retry::$retry,
                        outcome: Outcome::$outcome,
                        cause: $cause,
                        fix: $fix,
                        curl: $curl,
                    },)*
                }
            }
        }
    };
}

// Nothing that sells says `Never` here: only a script that looked the key up may, see `looked_up`.
codes! {
    /// Before the window, or between rounds.
    NotOpen "not_open" CONFLICT "The sale is not open yet" After NotApplied
        cause "The purchase came before the sale's window, by the clock of the store that decides, or between two rounds. `opens_at` and `starts_in_ms` say when it opens."
        fix "Wait for `starts_in_ms` milliseconds and send the same request with the same key."
        curl "curl $STOCKADE/v1/sales/$SALE_ID"

    /// Stopped by an operator.
    Paused "paused" CONFLICT "The sale is paused" After NotApplied
        cause "An operator has stopped the sale for now, or it lets those come first whose accepted orders were lost. Nothing was taken; only receipts are served."
        fix "Retry with the same key after `Retry-After`, or follow the sale's event stream. Who has a receipt of a lost order redeems it now."
        curl "curl -N $STOCKADE/v1/sales/$SALE_ID/events"

    /// After the window, or closed by an operator.
    Closed "closed" CONFLICT "The sale is closed" SameKey NotApplied
        cause "The sale's window has passed, or an operator closed it."
        fix "If an earlier attempt may have been accepted, repeat it with its own key: it answers 201 even now. Otherwise there is nothing more to buy."
        curl "curl $STOCKADE/v1/sales/$SALE_ID"

    /// Nothing is left.
    SoldOut "sold_out" CONFLICT "Sold out" SameKey NotApplied
        cause "No unit is left in this round."
        fix "If an earlier attempt may have been accepted, repeat it with its own key. Units that are given back are sold again: follow the event stream."
        curl "curl -N $STOCKADE/v1/sales/$SALE_ID/events"

    /// Fewer are left than asked for.
    Insufficient "insufficient" CONFLICT "Fewer units are left than asked for" SameKey NotApplied
        cause "Some units are left, but fewer than `quantity`. `remaining` says how many there were."
        fix "Ask for fewer, with a new key: another quantity is another request."
        curl "curl -X POST $STOCKADE/v1/sales/$SALE_ID/orders -H \"Authorization: Bearer $TOKEN\" -H 'Idempotency-Key: order-2' -H 'Content-Type: application/json' -d '{\"quantity\": 1}'"

    /// More than one buyer may hold.
    BuyerLimit "buyer_limit" CONFLICT "More than one buyer may have" SameKey NotApplied
        cause "The buyer would hold more than `limit` units of this round, or has bought and cancelled too often. `held` says how many the buyer has."
        fix "Ask for at most `limit` - `held` units. Cancelling an order makes room."
        curl "curl $STOCKADE/v1/orders?sale_id=$SALE_ID -H \"Authorization: Bearer $TOKEN\""

    /// More than one order may ask for.
    OrderLimit "order_limit" UNPROCESSABLE_ENTITY "More than one order may ask for" SameKey NotApplied
        cause "`quantity` is above the sale's `per_order_limit`, given as `limit`."
        fix "Ask for at most `limit` units, with a new key."
        curl "curl $STOCKADE/v1/sales/$SALE_ID"

    /// Younger than the sale asks for, or of an unknown age.
    AccountTooYoung "account_too_young" FORBIDDEN "The account is too young" SameKey NotApplied
        cause "The sale sells to accounts of at least `min_account_age_seconds`, and this one is younger: `old_enough_at` says from when on it is not. Without `old_enough_at` the credential does not say when the account was made."
        fix "Send the same request with the same key after `old_enough_at`. Without it, log in again; who signs tokens elsewhere has to put the claim `registered_at` in."
        curl "curl $STOCKADE/v1/sales/$SALE_ID"

    /// The sale asks for work.
    ProofRequired "proof_required" FORBIDDEN "A proof of work is required" SameKey NotApplied
        cause "The sale has `proof_of_work_bits`, and the request has no `Proof-Of-Work` header. If its key has an order already, that could not be looked up at the moment."
        fix "Get a challenge from the address in `challenge`, with the `Idempotency-Key` of this request. Solve it, and send this request again with the proof and the same key."
        curl "curl -X POST $STOCKADE/v1/sales/$SALE_ID/challenge -H \"Authorization: Bearer $TOKEN\" -H 'Idempotency-Key: order-1' -H 'Content-Type: application/json' -d '{\"purpose\": \"order\"}'"

    /// There is a proof, and it proves nothing.
    ProofInvalid "proof_invalid" FORBIDDEN "The proof of work is not valid" SameKey NotApplied
        cause "`reason` says it: `unreadable`, it has not the form `<challenge>.<number>`; `foreign`, its challenge was not given out for this sale, user, purpose and `Idempotency-Key`; `too_easy`, the sale asks for more by now; `unsolved`, its hash has too few zero bits; `expired`, its challenge is older than two minutes."
        fix "Get a new challenge from the address in `challenge`, with the `Idempotency-Key` of this request. Solve it, and send this request again with the proof and the same key."
        curl "curl -X POST $STOCKADE/v1/sales/$SALE_ID/challenge -H \"Authorization: Bearer $TOKEN\" -H 'Idempotency-Key: order-1' -H 'Content-Type: application/json' -d '{\"purpose\": \"order\"}'"

    /// The header is absent or empty.
    IdempotencyKeyMissing "idempotency_key_missing" BAD_REQUEST "An Idempotency-Key is required" Never NotApplied
        cause "The request moves units or money, and has no `Idempotency-Key` header, or an empty one. Without a key a lost answer could not be told from a lost request."
        fix "Make a key (a UUID will do), keep it before you send, and send it again with every retry."
        curl "curl -X POST $STOCKADE/v1/sales/$SALE_ID/orders -H \"Authorization: Bearer $TOKEN\" -H \"Idempotency-Key: $(uuidgen)\" -H 'Content-Type: application/json' -d '{\"quantity\": 1}'"

    /// The key stands for another request.
    IdempotencyKeyMismatch "idempotency_key_mismatch" UNPROCESSABLE_ENTITY "The key belongs to another request" Never NotApplied
        cause "The same user has used this key for the same operation with another body."
        fix "Repeat the first request exactly to get its answer, or take a new key for a new one."
        curl "curl -X POST $STOCKADE/v1/sales/$SALE_ID/orders -H \"Authorization: Bearer $TOKEN\" -H \"Idempotency-Key: $(uuidgen)\" -H 'Content-Type: application/json' -d '{\"quantity\": 2}'"

    /// Not signed here.
    ReceiptInvalid "receipt_invalid" UNPROCESSABLE_ENTITY "Not a receipt of this server" Never NotApplied
        cause "The text is no receipt, was changed, or is signed with a key that this server does not have (any more). `errors` says which."
        fix "Send `receipt` exactly as the 201 had it. If the key is missing, the operator has to configure it again (`STOCKADE_RECEIPT_KEYS`)."
        curl "curl -X POST $STOCKADE/v1/receipts -H \"Authorization: Bearer $TOKEN\" -H 'Content-Type: application/json' -d \"{\\\"receipt\\\": \\\"$RECEIPT\\\"}\""

    /// Genuine, but its order is neither there nor reported lost.
    NotRedeemable "not_redeemable" CONFLICT "No reported loss covers this receipt" SameKey NotApplied
        cause "The receipt is genuine, but there is no such order, and no recovery has reported a loss that it could be part of. That should not happen: the server's log has it."
        fix "Keep the receipt, and show it to the operator. While a loss is still being worked up, the same request may succeed later."
        curl "curl $STOCKADE/v1/orders/$ORDER_ID -H \"Authorization: Bearer $TOKEN\""

    /// Not paid in time.
    HoldExpired "hold_expired" CONFLICT "The order was not paid in time" Never NotApplied
        cause "A held order has to be paid before `held_until`. It was not, and its units are for sale again. Nothing was taken: money that was reserved is let go, and money that came too late buys the units again or goes back."
        fix "Buy again, with a new key, and pay sooner."
        curl "curl -X POST $STOCKADE/v1/sales/$SALE_ID/orders -H \"Authorization: Bearer $TOKEN\" -H \"Idempotency-Key: $(uuidgen)\" -H 'Content-Type: application/json' -d '{\"quantity\": 1}'"

    /// A cart is bought as a whole or not at all.
    CheckoutFailed "checkout_failed" CONFLICT "The cart was not bought" SameKey NotApplied
        cause "At least one line of the cart could not be had, so none was bought. `lines` says why, line by line, with the codes of a purchase; `left_out` is a line that could have been had."
        fix "Change the cart, and check out with a new key. With the same key the answer stays the same if `retry` is `never`; else nothing was held, and it is tried again."
        curl "curl $STOCKADE/v1/cart -H \"Authorization: Bearer $TOKEN\""

    /// The bank said no.
    PaymentDeclined "payment_declined" PAYMENT_REQUIRED "The bank did not pay" Never NotApplied
        cause "The bank or the gateway refused this payment; `decline` says why, as far as it tells. Nothing was taken, and the order is still held until `held_until`."
        fix "Pay with something else before `held_until`, with a new key: this key stands for the payment that was declined."
        curl "curl -X POST $STOCKADE/v1/orders/$ORDER_ID/pay -H \"Authorization: Bearer $TOKEN\" -H \"Idempotency-Key: $(uuidgen)\" -H 'Content-Type: application/json' -d '{\"payment_method\": \"sandbox_ok\"}'"

    /// The gateway does not answer.
    GatewayUnavailable "gateway_unavailable" SERVICE_UNAVAILABLE "The payment gateway does not answer" After Unknown
        cause "The gateway is down, slow, or left alone for a moment because it was. The payment may have been reserved or not; it is found out by itself. The order is still held until `held_until`, and nothing is taken for an order that is not confirmed."
        fix "Send the same request with the same key after `Retry-After`, before `held_until`: it pays once, however often it is sent."
        curl "curl $STOCKADE/v1/orders/$ORDER_ID -H \"Authorization: Bearer $TOKEN\""

    /// Not signed by the gateway.
    WebhookInvalid "webhook_invalid" BAD_REQUEST "Not a webhook of this gateway" Never NotApplied
        cause "The signature is missing, wrong, or more than five minutes from now, the body is no event, or this gateway is not configured."
        fix "Check the webhook's secret in the configuration, and this machine's clock. Events that were refused are sent again by the gateway."
        curl "curl -i -X POST $STOCKADE/v1/webhooks/sandbox -d '{}'"

    /// Cannot be read (400), or is out of range (422).
    Validation "validation" BAD_REQUEST "The request is not valid" Never NotApplied
        cause "Status 400: the request cannot be read, because of its syntax, a wrong type, an unknown field or a bad query. Status 422: it can be read, but a value is out of range. `errors` points to each place."
        fix "Mend what `errors` points to. Unknown fields are refused, not ignored."
        curl "curl $STOCKADE/v1/products?limit=1000"

    /// No token, or none to believe.
    Unauthenticated "unauthenticated" UNAUTHORIZED "A valid access token is required" SameKey NotApplied
        cause "There is no access token or API key, or it is not valid: expired, revoked, of a session that has ended, signed by somebody else, or of another kind. The answer is the same for all of them."
        fix "Refresh, or log in, and send `Authorization: Bearer <access_token>`."
        curl "curl -X POST $STOCKADE/v1/auth/login -H 'Content-Type: application/json' -d '{\"email\": \"ada@example.org\", \"password\": \"correct horse battery staple\"}'"

    /// Wrong e-mail, password or refresh token.
    InvalidCredentials "invalid_credentials" UNAUTHORIZED "The credentials are not valid" Never NotApplied
        cause "The e-mail address and the password do not belong together, or the refresh token is unknown, expired or used. A refresh token works once; using it again ends its session."
        fix "Check what was typed, or log in again."
        curl "curl -X POST $STOCKADE/v1/auth/login -H 'Content-Type: application/json' -d '{\"email\": \"ada@example.org\", \"password\": \"correct horse battery staple\"}'"

    /// The role does not suffice.
    Forbidden "forbidden" FORBIDDEN "Not allowed for this role" Never NotApplied
        cause "The token or API key is valid, but its role may not do this, or the key lacks the scope; accounts, keys and users are managed with a token only. `detail` says which."
        fix "Use the token of somebody who may, or a key with the scope."
        curl "curl $STOCKADE/v1/me -H \"Authorization: Bearer $TOKEN\""

    /// Nothing is there, or nothing that is yours.
    NotFound "not_found" NOT_FOUND "Not found" Never NotApplied
        cause "There is no such route, or nothing with this id, or it belongs to somebody else."
        fix "Check the address. Ids are UUIDs, as the lists show them."
        curl "curl $STOCKADE/v1/products"

    /// The route does not have this method.
    MethodNotAllowed "method_not_allowed" METHOD_NOT_ALLOWED "The method is not allowed here" Never NotApplied
        cause "The route exists, but not with this method."
        fix "Use one of the methods in the `Allow` header."
        curl "curl -i -X OPTIONS $STOCKADE/v1/products"

    /// The state of things does not allow it.
    Conflict "conflict" CONFLICT "The state of things does not allow this" Never NotApplied
        cause "What was asked for contradicts what is there, such as removing a product that a sale refers to."
        fix "Read the present state, then decide."
        curl "curl $STOCKADE/v1/products/$PRODUCT_ID"

    /// Somebody has registered with the address.
    EmailTaken "email_taken" CONFLICT "The e-mail address is taken" Never NotApplied
        cause "Somebody has registered with this address. Capitals do not make another one."
        fix "Log in instead."
        curl "curl -X POST $STOCKADE/v1/auth/login -H 'Content-Type: application/json' -d '{\"email\": \"ada@example.org\", \"password\": \"correct horse battery staple\"}'"

    /// More often than anybody may.
    RateLimited "rate_limited" TOO_MANY_REQUESTS "Too many requests" After NotApplied
        cause "This user, this address or this account did more in a short time than anybody may. `RateLimit-Policy` names the limit and how much of it there is, `RateLimit` what is left. Nothing was done."
        fix "Send the same request with the same key, but not before `Retry-After` seconds. Whoever goes on asking meanwhile gets the same answer, and no worse one."
        curl "curl -i $STOCKADE/v1/sales/$SALE_ID"

    /// The body is not there yet.
    RequestTimeout "request_timeout" REQUEST_TIMEOUT "The request came too slowly" After NotApplied
        cause "The body of the request did not arrive within two and a half seconds of its head. Nothing was done."
        fix "Send the same request with the same key again, over a better connection."
        curl "curl -i $STOCKADE/livez"

    /// Somebody else changed it meanwhile.
    PreconditionFailed "precondition_failed" PRECONDITION_FAILED "It has changed meanwhile" Never NotApplied
        cause "`If-Match` names a version that is not the present one."
        fix "Get it again, look at what changed, and send your change with the new `ETag`."
        curl "curl -i $STOCKADE/v1/products/$PRODUCT_ID"

    /// `If-Match` is absent.
    PreconditionRequired "precondition_required" PRECONDITION_REQUIRED "If-Match is required" Never NotApplied
        cause "A change needs an `If-Match` header, so that nobody overwrites what somebody else has just written."
        fix "Send the `ETag` that the last read gave."
        curl "curl -X PATCH $STOCKADE/v1/products/$PRODUCT_ID -H \"Authorization: Bearer $TOKEN\" -H 'If-Match: \"1\"' -H 'Content-Type: application/json' -d '{\"name\": \"Blue lamp\"}'"

    /// The body is too large.
    PayloadTooLarge "payload_too_large" PAYLOAD_TOO_LARGE "The body is too large" Never NotApplied
        cause "The body is larger than 16 KiB, or an image larger than 5 MiB."
        fix "Send less. No request of this API needs so much, and no page such an image."
        curl "curl $STOCKADE/openapi.json"

    /// The body is not declared as what is expected.
    UnsupportedMediaType "unsupported_media_type" UNSUPPORTED_MEDIA_TYPE "The body's type is not the one expected" Never NotApplied
        cause "The body's `Content-Type` is not `application/json`, or for an image none of `image/jpeg`, `image/png` and `image/webp`."
        fix "Send `Content-Type: application/json`, or the image's own type."
        curl "curl -X POST $STOCKADE/v1/auth/login -H 'Content-Type: application/json' -d '{\"email\": \"ada@example.org\", \"password\": \"correct horse battery staple\"}'"

    /// A part that is needed does not answer, or there is too much to do.
    Unavailable "unavailable" SERVICE_UNAVAILABLE "Not available at the moment" After NotApplied
        cause "A store does not answer, or too much is waiting already. With `outcome: unknown` the request may have been carried out, or may still be."
        fix "Repeat the same request with the same key after `Retry-After`: it has one effect, however often it is sent."
        curl "curl -i $STOCKADE/readyz"

    /// The stores do not keep an acceptance as the sale promises.
    NotDurable "not_durable" SERVICE_UNAVAILABLE "The stores cannot keep what this sale promises" After NotApplied
        cause "The sale promises that an acceptance survives certain failures (`durability`), and the settings of Redis or PostgreSQL do not give that at the moment, or too few replicas follow. `lack` says what is missing. Nothing is accepted meanwhile; other sales go on."
        fix "Buyers: retry with the same key after `Retry-After`. The operator: change what `lack` names; selling goes on by itself."
        curl "curl -i $STOCKADE/readyz"

    /// A mistake of the server.
    Internal "internal" INTERNAL_SERVER_ERROR "An error inside the server" SameKey Unknown
        cause "Something happened that should not. The server's log has more, under the id in `instance`."
        fix "Repeat the same request with the same key. If it stays, report the id."
        curl "curl -i $STOCKADE/livez"
}

impl Code {
    /// The code with this word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|code| code.meaning().word == word)
    }
}

/// One place that is wrong in a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    /// Where: a JSON pointer into the body, or below `#/query` or `#/headers`.
    #[schema(example = "#/quantity")]
    pub pointer: String,
    /// What is wrong there.
    pub detail: String,
}

impl FieldError {
    /// `detail` at `pointer`.
    pub fn new(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            pointer: pointer.into(),
            detail: detail.into(),
        }
    }
}

/// A refusal on its way to the client.
///
/// Boxed, because it travels in the error of every handler's result.
#[derive(Clone)]
pub struct Problem(Box<Parts>);

/// Room for a document, so that it is written without growing.
const BODY_BYTES: usize = 512;

#[derive(Clone, Debug)]
struct Parts {
    code: Code,
    status: StatusCode,
    detail: Cow<'static, str>,
    outcome: Outcome,
    retry: Retry,
    retry_after_seconds: Option<u64>,
    errors: Vec<FieldError>,
    facts: Map<String, Value>,
    cause: Option<String>,
    exceeded: Option<Exceeded>,
}

/// The document: RFC 9457, with the members that every refusal here has, and the facts of this
/// one beside them.
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub(super) struct Document<'a> {
    /// The page that explains the code.
    #[serde(rename = "type")]
    #[schema(example = "/docs/problems/sold_out")]
    page: String,
    title: &'static str,
    #[schema(example = 409)]
    status: u16,
    detail: &'a str,
    /// The request's id, also in `x-request-id`.
    instance: &'a str,
    code: Code,
    outcome: Outcome,
    retry: Retry,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    errors: &'a [FieldError],
    #[serde(flatten)]
    facts: &'a Map<String, Value>,
}

impl Problem {
    /// A refusal with the code's own retry and outcome. `detail` is for a human, about this case.
    pub fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Self {
        let Meaning {
            status,
            retry,
            outcome,
            ..
        } = code.meaning();
        let retry_after_seconds = (retry == Retry::After).then_some(1);
        Self(Box::new(Parts {
            code,
            status,
            detail: detail.into(),
            outcome,
            retry,
            retry_after_seconds,
            errors: Vec::new(),
            facts: Map::new(),
            cause: None,
            exceeded: None,
        }))
    }

    /// A request that cannot be read at one place (400).
    pub fn unreadable(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        let mut problem = Self::new(Code::Validation, "The request cannot be read.");
        problem.0.errors.push(FieldError::new(pointer, detail));
        problem
    }

    /// A request that can be read but has values out of range (422).
    pub fn out_of_range(errors: Vec<FieldError>) -> Self {
        let mut problem = Self::new(Code::Validation, "A value is out of range.");
        problem.0.status = StatusCode::UNPROCESSABLE_ENTITY;
        problem.0.errors = errors;
        problem
    }

    /// There is nothing here, or nothing that the caller may know of: both answer the same.
    pub fn not_found() -> Self {
        Self::new(Code::NotFound, "There is nothing at this address.")
    }

    /// A mistake of ours. `cause` goes to the log under the request's id, never to the client.
    pub fn internal(cause: impl fmt::Display) -> Self {
        let mut problem = Self::new(Code::Internal, "Something went wrong inside the server.");
        problem.0.cause = Some(cause.to_string());
        problem
    }

    /// With a place in the request that is wrong.
    #[must_use]
    pub fn at(mut self, error: FieldError) -> Self {
        self.0.errors.push(error);
        self
    }

    /// Nothing was done; the same request may succeed in a second.
    pub fn unavailable(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::Unavailable, detail)
    }

    /// The request may have been carried out, or may still be for so long.
    pub fn unknown(detail: impl Into<Cow<'static, str>>, may_run_for: Duration) -> Self {
        let mut problem = Self::new(Code::Unavailable, detail).after(may_run_for);
        problem.0.outcome = Outcome::Unknown;
        problem
    }

    /// The refusal comes from a script that looked the key up: no retry with it can succeed.
    #[must_use]
    pub fn looked_up(mut self) -> Self {
        self.0.retry = Retry::Never;
        self.0.retry_after_seconds = None;
        self
    }

    /// Retry, but not before `wait`, rounded up to whole seconds.
    #[must_use]
    pub fn after(mut self, wait: Duration) -> Self {
        self.0.retry = Retry::After;
        self.0.retry_after_seconds = Some(
            wait.as_millis()
                .div_ceil(1000)
                .try_into()
                .unwrap_or(u64::MAX),
        );
        self
    }

    /// With a fact that a client needs, as a further member.
    #[must_use]
    pub fn fact(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.0.facts.insert(name.to_owned(), value.into());
        self
    }

    /// With the limit in its headers.
    #[must_use]
    pub(super) fn limited(mut self, exceeded: Exceeded) -> Self {
        self.0.exceeded = Some(exceeded);
        self
    }

    /// With what the log should say beside it.
    #[must_use]
    pub fn caused_by(mut self, cause: impl fmt::Display) -> Self {
        self.0.cause = Some(cause.to_string());
        self
    }

    /// What a part of a larger answer says of it: code, detail and facts.
    pub(super) fn brief(&self) -> Value {
        let mut brief = self.0.facts.clone();
        brief.insert("code".to_owned(), self.0.code.meaning().word.into());
        brief.insert("detail".to_owned(), self.0.detail.as_ref().into());
        Value::Object(brief)
    }

    /// As the answer to a request that only reads: it cannot have changed anything.
    #[must_use]
    pub(super) fn of_reading(mut self) -> Self {
        self.0.outcome = Outcome::NotApplied;
        self
    }

    /// Its code.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    /// Whether the same request can succeed later.
    pub fn retry(&self) -> Retry {
        self.0.retry
    }

    /// What the log should say beside it.
    pub(super) fn cause(&self) -> Option<&str> {
        self.0.cause.as_deref()
    }

    /// Turns `response` into the document, keeping its other headers (such as `Allow`).
    pub(super) fn render(&self, request_id: &str, response: &mut Response) {
        let Parts {
            code,
            status,
            detail,
            outcome,
            retry,
            errors,
            facts,
            ..
        } = &*self.0;
        let meaning = code.meaning();
        let document = Document {
            page: format!("/docs/problems/{}", meaning.word),
            title: meaning.title,
            status: status.as_u16(),
            detail,
            instance: request_id,
            code: *code,
            outcome: *outcome,
            retry: *retry,
            errors,
            facts,
        };
        let mut body = Vec::with_capacity(BODY_BYTES);
        // Strings, numbers and maps with string keys always become JSON.
        let _written = serde_json::to_writer(&mut body, &document);
        *response.status_mut() = *status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(seconds) = self.0.retry_after_seconds {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(exceeded) = &self.0.exceeded {
            limit::tell(exceeded, headers);
        }
        if *status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        *response.body_mut() = Body::from(body);
    }
}

impl fmt::Debug for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The document needs the request's id, which a handler does not know: [`edge`](super::edge)
/// takes the problem out again and renders it.
impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// A call that was sent may run until its deadline; a second is for clocks and the way.
pub(super) const CALL_MAY_RUN_FOR: Duration =
    Duration::from_millis(CALL_DEADLINE_MS.unsigned_abs() + 1000);

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Self::from(&error)
    }
}

impl From<&StoreError> for Problem {
    fn from(error: &StoreError) -> Self {
        match error {
            // Like the engine's: everybody gets this at once, so it is counted, not logged.
            StoreError::Unavailable(_) => {
                tracing::debug!(%error, "the database has no answer");
                Self::unknown("The database does not answer.", Duration::from_secs(1))
            }
            StoreError::Unexpected(_) => Self::internal(error),
        }
    }
}

/// Without a cause for the log: in a crowd everybody gets the same answer at once, so these are
/// counted, and whoever lost the connection has logged it once.
impl From<EngineError> for Problem {
    fn from(error: EngineError) -> Self {
        tracing::debug!(%error, "the engine has no answer");
        let problem = match &error {
            error if !error.may_have_run() => {
                Self::unavailable("The store that decides is not available.")
            }
            // It has run: nothing is on its way any more.
            EngineError::Unreplicated { .. } => Self::unknown(
                "The order is there, and too few replicas have it yet.",
                Duration::from_secs(1),
            ),
            _ => Self::unknown("The store that decides did not answer.", CALL_MAY_RUN_FOR),
        };
        match error {
            EngineError::Protocol(_) => problem.caused_by(error),
            EngineError::Overloaded(_)
            | EngineError::Disconnected
            | EngineError::Fenced(_)
            | EngineError::Damaged(_)
            | EngineError::Refused(_)
            | EngineError::Expired
            | EngineError::Unreplicated { .. }
            | EngineError::Unknown(_) => problem,
        }
    }
}

impl From<SaleError> for Problem {
    fn from(error: SaleError) -> Self {
        match error {
            SaleError::NotFound => Self::not_found(),
            SaleError::Mismatch => Self::new(
                Code::IdempotencyKeyMismatch,
                "This key belongs to another request.",
            ),
            SaleError::NoProduct => {
                let missing = FieldError::new("#/product_id", "there is no such product");
                Self::out_of_range(vec![missing])
            }
            SaleError::Terms(error) => super::sales::contradiction(error),
            SaleError::Range(pointer, detail) => {
                Self::out_of_range(vec![FieldError::new(pointer, detail)])
            }
            SaleError::NoWindow => {
                let detail = "no window opens behind the rounds that are made";
                Self::out_of_range(vec![FieldError::new("#/schedule", detail)])
            }
            SaleError::Stale => super::version::stale(),
            SaleError::Conflict(detail) => Self::new(Code::Conflict, detail),
            SaleError::HoldExpired(orders) => super::payments::expired(&orders),
            SaleError::Unlike(orders) => super::checkouts::unlike(&orders),
            SaleError::NoPayment => super::payments::method("this sale takes no payment"),
            SaleError::NoMethod => super::payments::method("is needed: this sale takes money"),
            SaleError::Hurdle(sale, hurdle) => super::hurdles::stopped(sale, hurdle),
            SaleError::Busy => {
                let detail = "Another attempt with this key is under way.";
                Self::unknown(detail, Duration::from_secs(1))
            }
            SaleError::Refused(refusal, now_ms) => {
                let decision = Decision::Refused(refusal);
                let answer = Answer {
                    decision,
                    looked_up: true,
                    now_ms,
                };
                super::orders::refused(refusal, &answer)
            }
            SaleError::TooMany => {
                let detail = format!("the allocation would leave 1 to {ALLOCATION_MAX}");
                Self::out_of_range(vec![FieldError::new("#/units", detail)])
            }
            SaleError::Lack(lack) => {
                let detail = "The sale promises more than the stores can keep at the moment.";
                Self::new(Code::NotDurable, detail).fact("lack", lack.to_string())
            }
            SaleError::Behind => {
                Self::unavailable("The store that remembers is behind, and the sale waits for it.")
                    .after(Duration::from_millis(WRITER_STALL_MS))
            }
            SaleError::NotStored => Self::unknown(
                "The order is there, and the store that remembers does not have it yet.",
                Duration::from_secs(1),
            ),
            SaleError::Engine(error) => error.into(),
            // PostgreSQL is asked which sale or order is meant, before anything is decided; only
            // making a sale writes there, and says so itself.
            SaleError::Store(error) => Self::from(&*error).of_reading(),
        }
    }
}

impl Problem {
    /// The answer when making a sale came to no end: it may be there, and is finished later.
    pub(super) fn of_making(error: SaleError) -> Self {
        match error {
            SaleError::Engine(_) | SaleError::Store(_) => {
                Self::unknown("The sale could not be finished.", CALL_MAY_RUN_FOR).caused_by(error)
            }
            other => other.into(),
        }
    }
}

/// What [`edge`](super::edge) makes of an answer that refuses without saying why, such as the
/// router's own 404 and 405.
pub(super) fn bare(status: StatusCode) -> Problem {
    match status {
        StatusCode::NOT_FOUND => Problem::not_found(),
        StatusCode::METHOD_NOT_ALLOWED => Problem::new(
            Code::MethodNotAllowed,
            "The route does not have this method.",
        ),
        StatusCode::PAYLOAD_TOO_LARGE => too_large(BODY_BYTES_MAX),
        StatusCode::UNSUPPORTED_MEDIA_TYPE => Problem::new(
            Code::UnsupportedMediaType,
            "The body must be application/json.",
        ),
        StatusCode::SERVICE_UNAVAILABLE => Problem::unavailable("Not available at the moment."),
        status if status.is_client_error() => {
            Problem::unreadable("#", "The request cannot be read.")
        }
        status => Problem::internal(format_args!(
            "a handler answered {status} without a problem"
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The contract's list; a code that is missing here or there is a mistake.
    const CONTRACT: &[(&str, u16)] = &[
        ("not_open", 409),
        ("paused", 409),
        ("closed", 409),
        ("sold_out", 409),
        ("insufficient", 409),
        ("buyer_limit", 409),
        ("order_limit", 422),
        ("account_too_young", 403),
        ("proof_required", 403),
        ("proof_invalid", 403),
        ("idempotency_key_missing", 400),
        ("idempotency_key_mismatch", 422),
        ("receipt_invalid", 422),
        ("not_redeemable", 409),
        ("hold_expired", 409),
        ("checkout_failed", 409),
        ("payment_declined", 402),
        ("gateway_unavailable", 503),
        ("webhook_invalid", 400),
        ("validation", 400),
        ("unauthenticated", 401),
        ("invalid_credentials", 401),
        ("forbidden", 403),
        ("not_found", 404),
        ("method_not_allowed", 405),
        ("conflict", 409),
        ("email_taken", 409),
        ("rate_limited", 429),
        ("request_timeout", 408),
        ("precondition_failed", 412),
        ("precondition_required", 428),
        ("payload_too_large", 413),
        ("unsupported_media_type", 415),
        ("unavailable", 503),
        ("not_durable", 503),
        ("internal", 500),
    ];

    #[test]
    fn codes_are_their_words_in_documents_and_in_the_description() {
        let words: Vec<_> = Code::ALL.iter().map(|code| code.meaning().word).collect();
        assert_eq!(serde_json::to_value(Code::ALL).unwrap(), json!(words));
        let schema = serde_json::to_value(<Code as utoipa::PartialSchema>::schema()).unwrap();
        assert_eq!(schema["enum"], json!(words));
    }

    fn document(problem: &Problem) -> (Response, Value) {
        let mut response = problem.clone().into_response();
        problem.render("r-1", &mut response);
        let body = std::mem::take(response.body_mut());
        let bytes = futures::executor::block_on(axum::body::to_bytes(body, usize::MAX)).unwrap();
        assert_eq!(response.headers()[CONTENT_LENGTH], bytes.len().to_string());
        (response, serde_json::from_slice(&bytes).unwrap())
    }

    #[test]
    fn the_codes_are_those_of_the_contract() {
        let codes: Vec<_> = Code::ALL
            .iter()
            .map(|code| (code.meaning().word, code.meaning().status.as_u16()))
            .collect();
        assert_eq!(codes, CONTRACT);
    }

    #[test]
    fn every_code_makes_a_whole_document() {
        for &code in Code::ALL {
            let (response, body) = document(&Problem::new(code, "why"));
            let meaning = code.meaning();
            assert_eq!(Code::parse(meaning.word), Some(code));
            assert_eq!(response.status(), meaning.status);
            assert_eq!(response.headers()[CONTENT_TYPE], MEDIA_TYPE);
            assert_eq!(response.headers()[CACHE_CONTROL], "no-store");
            assert_eq!(body["type"], format!("/docs/problems/{}", meaning.word));
            assert_eq!(body["code"], meaning.word);
            assert_eq!(body["status"], meaning.status.as_u16());
            assert_eq!(body["detail"], "why");
            assert_eq!(body["instance"], "r-1");
            assert_eq!(body["title"], meaning.title);
            assert_eq!(
                response.headers().contains_key(RETRY_AFTER),
                body["retry"] == "after",
                "{code:?}"
            );
            assert_eq!(
                response
                    .headers()
                    .get(WWW_AUTHENTICATE)
                    .is_some_and(|value| value == "Bearer"),
                meaning.status == StatusCode::UNAUTHORIZED
            );
        }
    }

    #[test]
    fn a_refusal_of_a_sale_is_final_only_when_the_key_was_looked_up() {
        for code in [
            Code::NotOpen,
            Code::Paused,
            Code::Closed,
            Code::SoldOut,
            Code::Insufficient,
            Code::BuyerLimit,
            Code::OrderLimit,
        ] {
            let problem = Problem::new(code, "why");
            assert_ne!(document(&problem).1["retry"], "never", "{code:?}");
            assert_eq!(document(&problem.looked_up()).1["retry"], "never");
        }
    }

    #[test]
    fn facts_stand_beside_the_other_members_and_causes_stay_inside() {
        let problem = Problem::new(Code::BuyerLimit, "why")
            .fact("limit", 2)
            .fact("held", 1)
            .caused_by("key {p0}");
        let (_, body) = document(&problem);
        assert_eq!((&body["limit"], &body["held"]), (&2.into(), &1.into()));
        assert!(!body.to_string().contains("p0"));
        assert!(body.get("errors").is_none());
    }

    #[test]
    fn an_unknown_outcome_is_unavailable_and_says_how_long_it_may_last() {
        let (response, body) = document(&Problem::unknown("why", Duration::from_millis(1001)));
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[RETRY_AFTER], "2");
        assert_eq!(
            (&body["outcome"], &body["retry"]),
            (&"unknown".into(), &"after".into())
        );
    }

    #[test]
    fn out_of_range_points_to_each_place() {
        let errors = vec![FieldError::new("#/a", "x"), FieldError::new("#/b/0", "y")];
        let (response, body) = document(&Problem::out_of_range(errors));
        assert_eq!(response.status(), StatusCode::UNPROCESSABLE_ENTITY);
        assert_eq!(body["errors"][1]["pointer"], "#/b/0");
    }
}
