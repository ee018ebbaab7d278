//! One manifest file: from bytes to objects of the model and problems.
//!
//! A file is cut into documents by text alone (a line `---` or `...`), so that a broken document hides no other. A
//! document is parsed once, as JSON if it begins with a brace and as YAML otherwise; every object (of a List: every
//! item) is held as a [`Value`] only until it is converted. If an object is invalid, the document is read again, up to
//! the field in question, to find its line.

use std::fmt;
use std::num::NonZero;
use std::ops::Range;
use std::sync::Arc;

use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1 as discovery;
use serde::Deserialize;
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_path_to_error::Segment;
use serde_saphyr::budget::BudgetBreach;
use serde_saphyr::{MessageFormatter as _, Spanned, UserMessageFormatter};

use super::convert::{self, ConvertError, Quoted};
use lb_core::model::{Object, Problem};

/// The largest number of problems of one file that are reported individually.
const MAX_PROBLEMS: usize = 100;
/// The longest message, in characters. Messages quote the input.
const MAX_MESSAGE: usize = 400;
/// How much text of one file may be read again to find the lines of problems, in bytes.
const LOCATE_BYTES: usize = 256 << 20;
/// The deepest nesting. A CustomResourceDefinition, which may share a file with a Service, is some 40 deep.
const MAX_DEPTH: usize = 100;
/// The stack of a parsing thread, in bytes. A level of nesting takes up to 25 kB in a debug build.
const STACK: usize = 16 << 20;
/// How much text at least is worth a thread, in bytes.
const MIN_SHARE: usize = 1 << 20;

/// The kinds of `v1`, as far as they are written in manifests or come out of `kubectl get`.
const V1_KINDS: &[&str] = &[
    "APIGroup",
    "APIResourceList",
    "APIVersions",
    "Binding",
    "ComponentStatus",
    "ConfigMap",
    "Endpoints",
    "Event",
    "LimitRange",
    "Namespace",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "Pod",
    "PodTemplate",
    "ReplicationController",
    "ResourceQuota",
    "Secret",
    "ServiceAccount",
    "Status",
];

/// The contents of a file.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    /// The objects of the kinds that lb reads, in the order of the file.
    pub(crate) objects: Vec<Found>,
    /// All problems of the file.
    pub(crate) problems: Vec<Problem>,
}

/// An object and where it was found.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) object: Object,
    pub(crate) position: Position,
}

/// Location of an object in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    /// Number of the document, from 1; documents without content do not count.
    document: usize,
    /// Line of the document's first content, from 1.
    line: usize,
    /// Index in the List, if it is one.
    item: Option<usize>,
}

impl Position {
    /// The location, in the form of [`Problem::place`].
    pub(super) fn place(&self, file: &str) -> String {
        place(file, self.document, self.line)
    }

    /// Prefix of a message: the item of the List.
    pub(super) fn prefix(&self) -> String {
        self.item.map(|item| format!("items[{item}]: ")).unwrap_or_default()
    }
}

fn place(file: &str, document: usize, line: usize) -> String {
    format!("{file}: document {document} (line {line})")
}

/// Parses a file. `name` is used for [`Problem::place`] only; `json`: the name ends in `.json`.
pub(crate) fn parse(name: &str, bytes: &[u8], json: bool) -> Parsed {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut parsed = Parsed::default();
    let mut documents = 0;
    let mut unsaid = 0;
    for part in parts(name, bytes, json) {
        parsed.objects.extend(part.objects.into_iter().map(|mut found| {
            found.position.document += documents;
            found
        }));
        for (position, message) in part.problems {
            if parsed.problems.len() < MAX_PROBLEMS {
                let place = place(name, documents + position.document, position.line);
                parsed.problems.push(Problem::new(place, message));
            } else {
                unsaid += 1;
            }
        }
        documents += part.documents;
        unsaid += part.unsaid;
    }
    let mut about_all = |message: String| {
        let place = name.to_owned();
        parsed.problems.push(Problem::new(place, message));
    };
    if documents == 0 {
        let message = if bytes.is_empty() {
            "the file is empty"
        } else {
            "the file holds no document"
        };
        about_all(format!("{message} (to withdraw its objects, remove it)"));
    }
    if unsaid > 0 {
        about_all(format!("{unsaid} more problems"));
    }
    parsed
}

/// Parses the documents of a file, a large file in several threads.
fn parts<'a>(name: &'a str, bytes: &'a [u8], json: bool) -> Vec<Part<'a>> {
    let chunks = documents(bytes);
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let share = (bytes.len() / threads + 1).max(MIN_SHARE);
    let shares = chunks.chunk_by(|a, b| a.range.start / share == b.range.start / share);
    let work = |chunks: &[Chunk]| {
        let mut part = Part::new(name);
        for chunk in chunks {
            part.chunk(bytes, chunk, json);
        }
        part
    };
    std::thread::scope(|scope| {
        let started: Vec<_> = shares
            .map(|share| {
                let thread = std::thread::Builder::new().stack_size(STACK);
                (thread.spawn_scoped(scope, move || work(share)), share)
            })
            .collect();
        started
            .into_iter()
            .map(|(thread, share)| {
                let result = thread.map(std::thread::ScopedJoinHandle::join);
                let message = match result {
                    Ok(Ok(part)) => return part,
                    Ok(Err(_)) => "the parser has panicked".to_owned(),
                    Err(error) => format!("no thread to parse in: {error}"),
                };
                let mut part = Part::new(name);
                part.documents = share.len();
                part.problem(share.first().map_or(1, |chunk| chunk.line), &message);
                part
            })
            .collect()
    })
}

/// The text of one document.
#[derive(Debug, PartialEq, Eq)]
struct Chunk {
    /// Its location in the file.
    range: Range<usize>,
    /// The line where it begins, from 1.
    line: usize,
}

/// Cuts a file at the lines `---` and `...`, and leaves out leading markers, directives, comments and blank lines, and
/// documents that consist of nothing else.
fn documents(bytes: &[u8]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut open: Option<Chunk> = None;
    let mut start = 0;
    for (index, line) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
        let range = start..start + line.len();
        start = range.end;
        let is_marker = |marker: &[u8]| {
            line.strip_prefix(marker)
                .is_some_and(|rest| rest.first().is_none_or(u8::is_ascii_whitespace))
        };
        let content = if is_marker(b"---") {
            chunks.extend(open.take());
            !is_blank(&line[3..])
        } else if is_marker(b"...") {
            chunks.extend(open.take());
            false
        } else {
            !is_blank(line) && line[0] != b'%'
        };
        match &mut open {
            Some(chunk) => chunk.range.end = range.end,
            None if content => {
                open = Some(Chunk { range, line: index + 1 });
            }
            None => {}
        }
    }
    chunks.extend(open);
    chunks
}

/// Whether a line has only white space or a comment.
fn is_blank(line: &[u8]) -> bool {
    matches!(line.trim_ascii_start().first(), None | Some(b'#'))
}

/// A problem of an object.
#[derive(Debug)]
struct Fault {
    /// Path of the field, in the form of [`ConvertError::field`]; empty for the object itself.
    field: String,
    message: String,
}

impl Fault {
    fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            message: message.into(),
        }
    }

    /// Prepends the path of the parent object.
    fn within(self, parent: &str) -> Self {
        let dot = if self.field.is_empty() || self.field.starts_with('[') {
            ""
        } else {
            "."
        };
        Self {
            field: format!("{parent}{dot}{}", self.field),
            ..self
        }
    }
}

impl From<ConvertError> for Fault {
    fn from(error: ConvertError) -> Self {
        Self::new(error.field, error.reason.to_string())
    }
}

/// The contents of a part of a file's documents.
struct Part<'a> {
    name: &'a str,
    /// Number of documents so far; numbering begins with 1 in every part.
    documents: usize,
    objects: Vec<Found>,
    problems: Vec<(Position, String)>,
    /// Problems beyond [`MAX_PROBLEMS`].
    unsaid: usize,
    locate_bytes: usize,
}

impl<'a> Part<'a> {
    const fn new(name: &'a str) -> Self {
        Self {
            name,
            documents: 0,
            objects: Vec::new(),
            problems: Vec::new(),
            unsaid: 0,
            locate_bytes: LOCATE_BYTES,
        }
    }

    const fn position(&self, line: usize, item: Option<usize>) -> Position {
        let document = self.documents;
        Position { document, line, item }
    }

    fn problem(&mut self, line: usize, message: &str) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push((self.position(line, None), clean(message)));
        } else {
            self.unsaid += 1;
        }
    }

    fn fault(&mut self, text: &str, line: usize, fault: &Fault) {
        let mut at = line;
        if !fault.field.is_empty() && self.problems.len() < MAX_PROBLEMS {
            let path = segments(&fault.field);
            // The field itself may be missing; then the line of its parent is used.
            for length in (1..=path.len()).rev() {
                let Some(left) = self.locate_bytes.checked_sub(text.len()) else {
                    break;
                };
                self.locate_bytes = left;
                if let Some(found) = locate(text, &path[..length]) {
                    at = line + found - 1;
                    break;
                }
            }
        }
        if fault.field.is_empty() {
            self.problem(at, &fault.message);
        } else {
            self.problem(at, &format!("{}: {}", fault.field, fault.message));
        }
    }

    fn chunk(&mut self, bytes: &[u8], chunk: &Chunk, json: bool) {
        let bytes = &bytes[chunk.range.clone()];
        let line = chunk.line;
        let line_of = |offset: usize| line + bytes[..offset].iter().filter(|&&b| b == b'\n').count();
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                self.documents += 1;
                return self.problem(line_of(error.valid_up_to()), "not UTF-8");
            }
        };
        // The parsers treat some of these characters as the end of the text.
        let control = |&b: &u8| (b < 0x20 && !matches!(b, b'\t' | b'\n' | b'\r')) || b == 0x7f;
        if let Some(offset) = bytes.iter().position(control) {
            self.documents += 1;
            let message = format!("control character U+{:04X}", bytes[offset]);
            return self.problem(line_of(offset), &message);
        }
        if text.trim_start().starts_with(['{', '[']) || (json && !text.starts_with("---")) {
            self.json(text, line, json);
        } else {
            self.yaml(text, line);
        }
    }

    /// One or more JSON values, one after the other.
    fn json(&mut self, text: &str, line: usize, strict: bool) {
        let before = self.documents;
        let mut offset = 0;
        loop {
            let rest = &text[offset..];
            let blank = rest.len() - rest.trim_start().len();
            offset += blank;
            let rest = &text[offset..];
            if rest.is_empty() {
                return;
            }
            let line = line + text[..offset].matches('\n').count();
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Top>();
            match values.next() {
                Some(Ok(top)) => {
                    let end = values.byte_offset();
                    self.documents += 1;
                    self.top(&rest[..end], line, top);
                    offset += end;
                }
                None => return,
                // `{kind: Service}` is YAML, and no JSON.
                Some(Err(error)) if !strict && self.documents == before && !error.is_data() => {
                    return self.yaml(text, line);
                }
                Some(Err(error)) => {
                    self.documents += 1;
                    let suffix = format!(" at line {} column {}", error.line(), error.column());
                    let message = error.to_string();
                    let message = message.strip_suffix(&suffix).unwrap_or(&message);
                    self.problem(line + error.line().max(1) - 1, message);
                    return;
                }
            }
        }
    }

    fn yaml(&mut self, text: &str, line: usize) {
        self.documents += 1;
        let result = serde_saphyr::with_deserializer_from_str_with_options(text, options(text), |deserializer| {
            Option::<Top>::deserialize(deserializer)
        });
        match result {
            Ok(Some(top)) => self.top(text, line, top),
            Ok(None) => self.problem(line, NO_OBJECT),
            Err(error) => {
                let found = error.location().map_or(1, |location| location.line()).max(1);
                let at = line + usize::try_from(found).unwrap_or(usize::MAX).saturating_sub(1);
                self.problem(at, &yaml_message(&error));
            }
        }
    }

    fn top(&mut self, text: &str, line: usize, top: Top) {
        let mut fields = top.fields;
        let class = match classify(&fields, None) {
            Ok(class) => class,
            Err(fault) => return self.fault(text, line, &fault),
        };
        let default = match class {
            Class::Ignored => {
                tracing::debug!("{}, line {line}: of another kind, ignored", self.name);
                return;
            }
            Class::List(default) => default,
            Class::Ours(kind) => {
                // Only a List's items are kept apart from the other fields, and our kinds have no such field.
                match object(kind, std::mem::take(&mut fields)) {
                    Ok(Some(object)) => self.found(object, line, None),
                    Ok(None) => {}
                    Err(fault) => self.fault(text, line, &fault),
                }
                return;
            }
        };
        let items = match top.items {
            Some(Items::List(items)) => items,
            None | Some(Items::Null) => Vec::new(),
            Some(Items::Other) => {
                return self.fault(text, line, &Fault::new("items", "is not a list"));
            }
        };
        for (index, item) in items.into_iter().enumerate() {
            let result = match item {
                Item::Done(result) => result,
                Item::Bare(fields) => bare_item(fields, default),
            };
            match result {
                Ok(Some(object)) => self.found(object, line, Some(index)),
                Ok(None) => {}
                Err(fault) => self.fault(text, line, &fault.within(&format!("items[{index}]"))),
            }
        }
    }

    fn found(&mut self, object: Object, line: usize, item: Option<usize>) {
        let position = self.position(line, item);
        self.objects.push(Found { object, position });
    }
}

const NO_OBJECT: &str = "not an API object (a mapping with apiVersion and kind)";

/// Options of the YAML parser. Without aliases no value is larger than its text, and aliases are strictly limited.
fn options(text: &str) -> serde_saphyr::Options {
    let size = text.len().saturating_add(64);
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: size.saturating_mul(4),
            max_nodes: size.saturating_mul(4),
            max_total_scalar_bytes: size.saturating_mul(4),
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_documents: 1,
            max_inclusion_depth: 0,
            max_anchors: 1_000,
            max_aliases: 10_000,
            max_merge_keys: 1_000,
            max_recorded_anchor_events: 100_000,
            max_recorded_anchor_bytes: 4 << 20,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
            max_replay_stack_depth: 8,
        },
        duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::Error,
        non_finite_float_policy: serde_saphyr::options::NonFiniteFloatPolicy::AsString,
        // `name: on` means a name; to be sure, only `true` and `false` are booleans.
        strict_booleans: true,
        with_snippet: false,
    }
}

fn yaml_message(error: &serde_saphyr::Error) -> String {
    match error.without_snippet() {
        serde_saphyr::Error::AliasError { error, .. } => yaml_message(error),
        serde_saphyr::Error::MultipleDocuments { .. } => "something follows the end of the document".to_owned(),
        serde_saphyr::Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("{} is there twice", Quoted(key))
        }
        serde_saphyr::Error::Budget { breach, .. } => {
            format!("too large or too deep for a manifest: {}", exceeded(breach))
        }
        error => UserMessageFormatter.format_message(error).into_owned(),
    }
}

/// Returns the limit of [`options`] that a text exceeds, with the number at which the parser stopped.
fn exceeded(breach: &BudgetBreach) -> String {
    match breach {
        BudgetBreach::Events { events } => {
            format!("more elements than the size of the text allows (it stopped at {events})")
        }
        BudgetBreach::Nodes { nodes } => {
            format!("more values than the size of the text allows (it stopped at {nodes})")
        }
        BudgetBreach::ScalarBytes { total_scalar_bytes } => {
            format!("more text in values than its size allows (it stopped at {total_scalar_bytes} bytes)")
        }
        BudgetBreach::Aliases { aliases } => format!("too many aliases ({aliases})"),
        BudgetBreach::Anchors { anchors } => format!("too many anchors ({anchors})"),
        BudgetBreach::AliasAnchorRatio { aliases, anchors } => {
            format!("too many aliases ({aliases}) for its anchors ({anchors})")
        }
        BudgetBreach::Depth { depth } => format!("nested too deeply ({depth} levels)"),
        BudgetBreach::MergeKeys { merge_keys } => format!("too many merge keys ({merge_keys})"),
        BudgetBreach::RecordedAnchorEvents { .. } | BudgetBreach::RecordedAnchorBytes { .. } => {
            "its anchors have too much content".to_owned()
        }
        _ => "a limit of the YAML parser is exceeded".to_owned(),
    }
}

/// One line, free of control characters, and not too long.
fn clean(message: &str) -> String {
    let mut out: String = message
        .chars()
        .take(MAX_MESSAGE)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if message.chars().nth(MAX_MESSAGE).is_some() {
        out.push_str("...");
    }
    out
}

/// The kinds that lb reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ours {
    Service,
    EndpointSlice,
    Node,
}

impl Ours {
    const ALL: [Self; 3] = [Self::Service, Self::EndpointSlice, Self::Node];

    const fn kind(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
        }
    }

    const fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Node => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
        }
    }
}

/// How an object is handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Ours(Ours),
    /// A list, and the kind of items without a kind of their own.
    List(Option<Ours>),
    /// A kind that lb ignores.
    Ignored,
}

/// Classifies an object by its `apiVersion` and `kind`.
fn classify(fields: &Map<String, Value>, default: Option<Ours>) -> Result<Class, Fault> {
    let text = |name: &'static str| match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(Fault::new(name, "is not a string")),
    };
    let (api_version, kind) = match (text("apiVersion")?, text("kind")?, default) {
        (Some(api_version), Some(kind), _) => (api_version, kind),
        (None, None, Some(default)) => return Ok(Class::Ours(default)),
        (_, None, _) => return Err(Fault::new("kind", "missing")),
        (None, _, _) => return Err(Fault::new("apiVersion", "missing")),
    };
    for ours in Ours::ALL {
        let list = kind.strip_suffix("List") == Some(ours.kind());
        if kind != ours.kind() && !list {
            continue;
        }
        if api_version == ours.api_version() {
            return Ok(if list {
                Class::List(Some(ours))
            } else {
                Class::Ours(ours)
            });
        }
        // Other API groups have a Service too, such as serving.knative.dev; lb ignores these.
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        if !group.contains('.') || group.ends_with(".k8s.io") {
            let message = format!(
                "{} is not {}, the version of kind {kind}",
                Quoted(api_version),
                ours.api_version()
            );
            return Err(Fault::new("apiVersion", message));
        }
        return Ok(Class::Ignored);
    }
    let known = match api_version {
        "v1" if kind == "List" => return Ok(Class::List(None)),
        "v1" => V1_KINDS.contains(&kind.strip_suffix("List").unwrap_or(kind)) || V1_KINDS.contains(&kind),
        other => !other.starts_with("discovery.k8s.io/"),
    };
    if known {
        return Ok(Class::Ignored);
    }
    let message = format!("unknown kind {} of {}", Quoted(kind), Quoted(api_version));
    Err(Fault::new("kind", message))
}

/// An item of a List.
fn item(fields: Map<String, Value>) -> Result<Option<Object>, Fault> {
    match classify(&fields, None)? {
        Class::Ours(kind) => object(kind, fields),
        Class::Ignored => Ok(None),
        Class::List(_) => Err(Fault::new("kind", "a List cannot stand in a List")),
    }
}

/// An item without a kind, as in the API server's response to a list request.
fn bare_item(fields: Map<String, Value>, default: Option<Ours>) -> Result<Option<Object>, Fault> {
    match default {
        Some(kind) => object(kind, fields),
        None => item(fields),
    }
}

fn object(kind: Ours, fields: Map<String, Value>) -> Result<Option<Object>, Fault> {
    Ok(match kind {
        Ours::Service => Some(Object::Service(Arc::new(convert::service(&typed::<v1::Service>(
            fields,
        )?)?))),
        Ours::EndpointSlice => convert::endpoint_slice(&typed::<discovery::EndpointSlice>(fields)?)?
            .map(|slice| Object::EndpointSlice(Arc::new(slice))),
        Ours::Node => Some(Object::Node(Arc::new(convert::node(&typed::<v1::Node>(fields)?)?))),
    })
}

fn typed<T: DeserializeOwned>(mut fields: Map<String, Value>) -> Result<T, Fault> {
    // Large, and unused.
    if let Some(Value::Object(metadata)) = fields.get_mut("metadata") {
        metadata.remove("managedFields");
        metadata.remove("annotations");
    }
    serde_path_to_error::deserialize(Value::Object(fields)).map_err(|error| {
        let mut field = String::new();
        for segment in error.path() {
            match segment {
                Segment::Seq { index } => field.push_str(&format!("[{index}]")),
                Segment::Map { key } | Segment::Enum { variant: key } => {
                    if key.contains(['.', '[', ']', '/']) {
                        field.push_str(&format!("[{}]", Quoted(key)));
                    } else {
                        if !field.is_empty() {
                            field.push('.');
                        }
                        field.push_str(key);
                    }
                }
                Segment::Unknown => {}
            }
        }
        Fault::new(field, error.inner().to_string())
    })
}

/// A document in the course of parsing: its fields, and the items of a List, converted one by one.
struct Top {
    fields: Map<String, Value>,
    items: Option<Items>,
}

enum Items {
    List(Vec<Item>),
    Null,
    Other,
}

enum Item {
    Done(Result<Option<Object>, Fault>),
    /// An item without `apiVersion` and `kind`, which the List may declare later in the text.
    Bare(Map<String, Value>),
}

impl<'de> Deserialize<'de> for Top {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TopVisitor;
        impl<'de> Visitor<'de> for TopVisitor {
            type Value = Top;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an API object (a mapping with apiVersion and kind)")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Top, A::Error> {
                let mut fields = Map::new();
                let mut items = None;
                while let Some(key) = map.next_key::<String>()? {
                    if fields.contains_key(&key) || (items.is_some() && key == "items") {
                        return Err(twice(&key));
                    }
                    if key == "items" {
                        items = Some(map.next_value::<Items>()?);
                    } else {
                        let Unique(value) = map.next_value()?;
                        fields.insert(key, value);
                    }
                }
                Ok(Top { fields, items })
            }
        }
        deserializer.deserialize_any(TopVisitor)
    }
}

impl<'de> Deserialize<'de> for Items {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemsVisitor;
        impl<'de> Visitor<'de> for ItemsVisitor {
            type Value = Items;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Items, A::Error> {
                let mut items = Vec::new();
                while let Some(Unique(value)) = seq.next_element()? {
                    items.push(match value {
                        Value::Object(fields) if fields.contains_key("kind") || fields.contains_key("apiVersion") => {
                            Item::Done(item(fields))
                        }
                        Value::Object(fields) => Item::Bare(fields),
                        _ => Item::Done(Err(Fault::new("", NO_OBJECT))),
                    });
                }
                Ok(Items::List(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Items, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Items::Other)
            }

            fn visit_unit<E>(self) -> Result<Items, E> {
                Ok(Items::Null)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Items, E> {
                Ok(Items::Other)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Items, E> {
                Ok(Items::Other)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Items, E> {
                Ok(Items::Other)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Items, E> {
                Ok(Items::Other)
            }

            fn visit_str<E>(self, _: &str) -> Result<Items, E> {
                Ok(Items::Other)
            }
        }
        deserializer.deserialize_any(ItemsVisitor)
    }
}

fn twice<E: de::Error>(key: &str) -> E {
    E::custom(format_args!("{} is there twice", Quoted(key)))
}

/// A value without duplicate keys in its mappings: serde_json would silently take the last one.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct UniqueVisitor;
        impl<'de> Visitor<'de> for UniqueVisitor {
            type Value = Unique;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique, A::Error> {
                let mut fields = Map::new();
                while let Some(key) = map.next_key::<String>()? {
                    if fields.contains_key(&key) {
                        return Err(twice(&key));
                    }
                    let Unique(value) = map.next_value()?;
                    fields.insert(key, value);
                }
                Ok(Unique(Value::Object(fields)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Unique, A::Error> {
                let mut items = Vec::new();
                while let Some(Unique(value)) = seq.next_element()? {
                    items.push(value);
                }
                Ok(Unique(Value::Array(items)))
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Unique, D::Error> {
                Unique::deserialize(deserializer)
            }

            fn visit_none<E>(self) -> Result<Unique, E> {
                Ok(Unique(Value::Null))
            }

            fn visit_unit<E>(self) -> Result<Unique, E> {
                Ok(Unique(Value::Null))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Unique, E> {
                Ok(Unique(Value::Bool(value)))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Unique, E> {
                Ok(Unique(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Unique, E> {
                Ok(Unique(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Unique, E> {
                Ok(Unique(Number::from_f64(value).map_or(Value::Null, Value::Number)))
            }

            fn visit_str<E>(self, value: &str) -> Result<Unique, E> {
                Ok(Unique(value.into()))
            }

            fn visit_string<E>(self, value: String) -> Result<Unique, E> {
                Ok(Unique(value.into()))
            }

            fn visit_bytes<E>(self, value: &[u8]) -> Result<Unique, E> {
                Ok(Unique(String::from_utf8_lossy(value).into()))
            }
        }
        deserializer.deserialize_any(UniqueVisitor)
    }
}

/// A step on the way to a field.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Key(String),
    Index(usize),
}

/// The steps of a path such as `spec.ports[1].port` or `metadata.labels["a.b/c"]`.
fn segments(field: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut rest = field;
    while !rest.is_empty() {
        if let Some(quoted) = rest.strip_prefix("[\"") {
            let (key, tail) = quoted.split_once("\"]").unwrap_or((quoted, ""));
            steps.push(Step::Key(key.to_owned()));
            rest = tail;
        } else if let Some(index) = rest.strip_prefix('[') {
            let (index, tail) = index.split_once(']').unwrap_or((index, ""));
            steps.push(Step::Index(index.parse().unwrap_or(usize::MAX)));
            rest = tail;
        } else {
            let bare = rest.strip_prefix('.').unwrap_or(rest);
            let end = bare.find(['.', '[']).unwrap_or(bare.len());
            steps.push(Step::Key(bare[..end].to_owned()));
            rest = &bare[end..];
        }
    }
    steps
}

/// The line (from 1) of the value at a path in a document.
fn locate(text: &str, path: &[Step]) -> Option<usize> {
    let found = serde_saphyr::with_deserializer_from_str_with_options(text, options(text), |deserializer| {
        Locate(path).deserialize(deserializer)
    });
    found.ok().flatten()
}

struct Locate<'a>(&'a [Step]);

impl<'de> DeserializeSeed<'de> for Locate<'_> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        if self.0.is_empty() {
            let node = Spanned::<IgnoredAny>::deserialize(deserializer)?;
            return Ok(usize::try_from(node.referenced.line()).ok().filter(|&line| line > 0));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Locate<'_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            match self.0 {
                [Step::Key(wanted), rest @ ..] if *wanted == key => {
                    found = map.next_value_seed(Locate(rest))?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(found)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        for index in 0.. {
            let more = match self.0 {
                [Step::Index(wanted), rest @ ..] if *wanted == index => {
                    let value = seq.next_element_seed(Locate(rest))?;
                    found = value.flatten();
                    value.is_some()
                }
                _ => seq.next_element::<IgnoredAny>()?.is_some(),
            };
            if !more {
                break;
            }
        }
        Ok(found)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}
