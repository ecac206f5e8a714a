//! [`TraceContext`]: which trace a call belongs to, as the W3C recommendation *Trace Context*, level 1, has it travel.
//!
//! ```text
//! traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01
//!              version, trace id, id of the parent span, flags (1: sampled), in lower-case hexadecimal digits
//! tracestate:  vendor=value,tenant@vendor=value
//! ```
//!
//! In a call's metadata the two are entries with these names. What is malformed is as if it were not there: a
//! `traceparent` that is none begins a new trace, and a `tracestate` that is none is left out.

use std::fmt;
use std::str::FromStr;

use tollway_protocol::metadata::Metadata;

use crate::random;

/// The key of the entry that says where in which trace a call is.
const TRACEPARENT: &str = "traceparent";
/// The key of the entry with what vendors say of the trace.
const TRACESTATE: &str = "tracestate";
/// Most members of a list of states: the recommendation's own limit.
const MAX_MEMBERS: usize = 32;
/// Most bytes of a list of states that are passed on: what the recommendation asks for at least.
const MAX_STATE: usize = 512;
/// Members of a list that is too long go first when they are longer than this.
const LONG_MEMBER: usize = 128;
/// The flag of a trace that is recorded. All others are reserved, and are not passed on.
const SAMPLED: u8 = 1;

/// The id of a trace: 16 bytes, not all zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId([u8; 16]);

/// The id of a span: 8 bytes, not all zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpanId([u8; 8]);

macro_rules! id {
    ($name:ident) => {
        impl $name {
            /// The bytes, not all of which are zero.
            pub fn bytes(&self) -> &[u8] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

id!(TraceId);
id!(SpanId);

/// A text that is no `traceparent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a traceparent: 00-<32 hex digits>-<16 hex digits>-<2 hex digits> in lower case, and no id is zero")]
pub struct InvalidTraceContext;

/// Where in which trace a call is.
///
/// ```
/// use tollway::rpc::middleware::TraceContext;
///
/// let here: TraceContext = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse()?;
/// assert_eq!(here.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
/// assert!(here.is_sampled());
/// let child = here.child();
/// assert_eq!(child.trace_id(), here.trace_id());
/// assert_ne!(child.span_id(), here.span_id());
/// # Ok::<(), tollway::rpc::middleware::InvalidTraceContext>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    trace_id: TraceId,
    span_id: SpanId,
    is_sampled: bool,
    state: Option<String>,
}

impl TraceContext {
    /// The first span of a new trace.
    pub fn new(is_sampled: bool) -> Self {
        let mut trace_id = [0; 16];
        trace_id[..8].copy_from_slice(&random_id());
        trace_id[8..].copy_from_slice(&random_id());
        TraceContext { trace_id: TraceId(trace_id), span_id: SpanId(random_id()), is_sampled, state: None }
    }

    /// A span below this one.
    #[must_use]
    pub fn child(&self) -> Self {
        TraceContext { span_id: SpanId(random_id()), ..self.clone() }
    }

    /// What a call's metadata says, if it says so as it must.
    pub fn from_metadata(metadata: &Metadata) -> Option<Self> {
        let values = |key: &'static str| {
            metadata.iter().filter(move |entry| entry.key == key).map(|entry| std::str::from_utf8(&entry.value))
        };
        let mut parents = values(TRACEPARENT);
        // Of two it is not known which one is meant.
        let (Some(Ok(parent)), None) = (parents.next(), parents.next()) else { return None };
        let mut context: TraceContext = parent.parse().ok()?;
        let states: Result<Vec<&str>, _> = values(TRACESTATE).collect();
        context.state = states.ok().and_then(|states| parse_state(&states.join(",")));
        Some(context)
    }

    /// Adds the entries to a call's metadata.
    pub fn write_to(&self, metadata: &mut Metadata) {
        let mut with = std::mem::take(metadata).with(TRACEPARENT, self.to_string());
        if let Some(state) = &self.state {
            with = with.with(TRACESTATE, state.as_str());
        }
        *metadata = with;
    }

    /// Whether a call's metadata names a trace already, well or badly.
    pub(super) fn is_named_in(metadata: &Metadata) -> bool {
        metadata.value(TRACEPARENT).is_some()
    }

    /// The trace.
    pub fn trace_id(&self) -> TraceId {
        self.trace_id
    }

    /// The span: of a context that came with a call, the caller's.
    pub fn span_id(&self) -> SpanId {
        self.span_id
    }

    /// Whether the trace is recorded by who calls.
    pub fn is_sampled(&self) -> bool {
        self.is_sampled
    }

    /// What vendors say of it: `tracestate`.
    pub fn state(&self) -> Option<&str> {
        self.state.as_deref()
    }
}

impl fmt::Display for TraceContext {
    /// The value of `traceparent`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{}-{:02x}", self.trace_id, self.span_id, u8::from(self.is_sampled))
    }
}

impl FromStr for TraceContext {
    type Err = InvalidTraceContext;

    /// Reads a `traceparent`. Of a later version than 0 it takes what version 0 knows.
    fn from_str(text: &str) -> Result<Self, InvalidTraceContext> {
        let mut parts = text.splitn(5, '-');
        let mut part = || parts.next().ok_or(InvalidTraceContext);
        let ([version], trace_id, span_id, [flags]) =
            (hex::<1>(part()?)?, hex::<16>(part()?)?, hex::<8>(part()?)?, hex::<1>(part()?)?);
        let has_more = parts.next().is_some();
        // 255 is no version, and version 0 ends with the flags.
        let is_version = version != u8::MAX && !(version == 0 && has_more);
        if !is_version || trace_id == [0; 16] || span_id == [0; 8] {
            return Err(InvalidTraceContext);
        }
        let is_sampled = flags & SAMPLED != 0;
        Ok(TraceContext { trace_id: TraceId(trace_id), span_id: SpanId(span_id), is_sampled, state: None })
    }
}

/// Exactly so many bytes in lower-case hexadecimal digits.
fn hex<const N: usize>(digits: &str) -> Result<[u8; N], InvalidTraceContext> {
    let nibble = |digit: u8| match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        _ => Err(InvalidTraceContext),
    };
    if digits.len() != 2 * N {
        return Err(InvalidTraceContext);
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
        for &digit in pair {
            *byte = *byte << 4 | nibble(digit)?;
        }
    }
    Ok(bytes)
}

/// A random id, which is never all zero.
fn random_id() -> [u8; 8] {
    random::number().max(1).to_be_bytes()
}

/// A list of states in the form in which it is passed on; `None` if it is empty or malformed.
fn parse_state(list: &str) -> Option<String> {
    let members: Vec<&str> = list.split(',').map(|member| member.trim_matches([' ', '\t'])).collect();
    let mut members: Vec<&str> = members.into_iter().filter(|member| !member.is_empty()).collect();
    let mut keys = Vec::with_capacity(members.len());
    for member in &members {
        let (key, value) = member.split_once('=')?;
        if !is_key(key) || !is_value(value) || keys.contains(&key) {
            return None;
        }
        keys.push(key);
    }
    if members.is_empty() || members.len() > MAX_MEMBERS {
        return None;
    }
    let length = |members: &[&str]| members.iter().map(|member| member.len() + 1).sum::<usize>() - 1;
    if length(&members) > MAX_STATE {
        members.retain(|member| member.len() <= LONG_MEMBER);
        while !members.is_empty() && length(&members) > MAX_STATE {
            members.pop();
        }
    }
    (!members.is_empty()).then(|| members.join(","))
}

/// `key`, or `tenant@system`.
fn is_key(key: &str) -> bool {
    let is_rest = |text: &[u8]| {
        text.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-*/".contains(byte))
    };
    let is_name = |name: &str, max: usize, may_begin_with_digit: bool| match name.as_bytes() {
        [first, rest @ ..] => {
            let begins = first.is_ascii_lowercase() || may_begin_with_digit && first.is_ascii_digit();
            begins && name.len() <= max && is_rest(rest)
        }
        [] => false,
    };
    match key.split_once('@') {
        Some((tenant, system)) => is_name(tenant, 241, true) && is_name(system, 14, false),
        None => is_name(key, 256, false),
    }
}

/// 1 to 256 printable characters without a comma or an equals sign; the last one is no blank, which was cut off before.
fn is_value(value: &str) -> bool {
    let is_printable = |byte: u8| (0x20..=0x7e).contains(&byte) && byte != b',' && byte != b'=';
    (1..=256).contains(&value.len()) && value.bytes().all(is_printable)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn with(entries: &[(&str, &str)]) -> Metadata {
        entries.iter().fold(Metadata::new(), |metadata, (key, value)| metadata.with(*key, *value))
    }

    #[test]
    fn a_traceparent_survives_its_reading() {
        let context: TraceContext = PARENT.parse().expect("it is one");
        assert_eq!(context.to_string(), PARENT);
        assert_eq!(context.span_id().to_string(), "b7ad6b7169203331");
        let unsampled = PARENT.replace("-01", "-00").parse::<TraceContext>().expect("it is one");
        assert!(context.is_sampled() && !unsampled.is_sampled());
        let own = TraceContext::new(true);
        assert_eq!(own.to_string().parse(), Ok(own));
    }

    #[test]
    fn what_is_no_traceparent_is_refused() {
        let wrong = [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319-b7ad6b71692033311-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "0x-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            " 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0é",
        ];
        for text in wrong {
            assert_eq!(text.parse::<TraceContext>(), Err(InvalidTraceContext), "{text:?}");
        }
    }

    #[test]
    fn of_a_later_version_what_is_known_counts_and_unknown_flags_end_here() {
        let later = PARENT.replacen("00", "cc", 1).replace("-01", "-ff");
        for text in [later.clone(), later + "-what-will-be"] {
            assert_eq!(text.parse::<TraceContext>().map(|context| context.to_string()).as_deref(), Ok(PARENT));
        }
        assert!("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01.what".parse::<TraceContext>().is_err());
    }

    #[test]
    fn metadata_carries_both_entries_there_and_back() {
        let from = with(&[("traceparent", PARENT), ("tracestate", "a=1 , b@c=x y"), ("tracestate", ",d=2")]);
        let context = TraceContext::from_metadata(&from).expect("it is one");
        assert_eq!(context.state(), Some("a=1,b@c=x y,d=2"));
        let mut to = Metadata::new();
        context.write_to(&mut to);
        assert_eq!(TraceContext::from_metadata(&to), Some(context));
        assert_eq!(TraceContext::from_metadata(&with(&[("tracestate", "a=1")])), None, "nothing says which trace");
        assert_eq!(TraceContext::from_metadata(&with(&[("traceparent", PARENT), ("traceparent", PARENT)])), None);
    }

    #[test]
    fn a_malformed_tracestate_is_left_out_and_the_trace_goes_on() {
        let long_key = format!("{}=1", "k".repeat(257));
        let long_value = format!("k={}", "v".repeat(257));
        let many = (0..33).map(|number| format!("k{number}=1")).collect::<Vec<_>>().join(",");
        let wrong =
            ["k", "k=", "=v", "K=1", "1k=1", "k=1,k=2", "k=a=b", "a@1b=1", "@b=1", "a@=1", "k=\u{7f}", "k=é", ""];
        for state in wrong.into_iter().chain([&*long_key, &long_value, &many]) {
            let context = TraceContext::from_metadata(&with(&[("traceparent", PARENT), ("tracestate", state)]));
            assert_eq!(context.expect("the trace goes on").state(), None, "{state:?}");
        }
        let most = (0..32).map(|number| format!("k{number}=1")).collect::<Vec<_>>().join(",");
        assert_eq!(parse_state(&most), Some(most));
    }

    #[test]
    fn of_a_long_tracestate_long_members_go_first_and_then_the_last_ones() {
        let long = format!("long={}", "x".repeat(200));
        let short: Vec<String> = (0..7).map(|number| format!("k{number}={}", "y".repeat(90))).collect();
        let all = [&short[..1], &[long], &short[1..]].concat();
        let kept = parse_state(&all.join(",")).expect("some are kept");
        assert!(kept.len() <= MAX_STATE);
        assert_eq!(kept, short[..5].join(","));
    }
}
