//! The model of a service, read from its trait. Everything that is wrong is said at once, each where it stands.

use proc_macro2::{Span, TokenStream};
use quote::ToTokens;
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{
    Attribute, Block, Error, FnArg, GenericArgument, Ident, ItemTrait, LitInt, LitStr, Pat, PathArguments, Result,
    ReturnType, Token, TraitItem, TraitItemFn, Type, TypeImplTrait, TypeParamBound, Visibility,
};

use crate::price::Price;

/// The longest name of a service, in bytes: what an Open carries.
const MAX_NAME: usize = 256;

/// A service.
pub(crate) struct Service {
    pub(crate) attributes: Vec<Attribute>,
    pub(crate) visibility: Visibility,
    pub(crate) ident: Ident,
    pub(crate) supertraits: Punctuated<TypeParamBound, Token![+]>,
    pub(crate) name: String,
    pub(crate) version: u32,
    /// Whether both sides compare the text of the trait.
    pub(crate) is_checked: bool,
    pub(crate) methods: Vec<Method>,
}

/// A method of a service.
pub(crate) struct Method {
    /// All but `#[price]`.
    pub(crate) attributes: Vec<Attribute>,
    pub(crate) ident: Ident,
    /// The argument that is the server's own.
    pub(crate) context: Option<(Ident, Type)>,
    pub(crate) arguments: Vec<(Ident, Type)>,
    pub(crate) is_async: bool,
    pub(crate) returns: Returns,
    /// The error of a `Result`.
    pub(crate) error: Option<Type>,
    /// The type behind `->`.
    pub(crate) output: TokenStream,
    pub(crate) default: Option<Block>,
    pub(crate) price: Option<Price>,
    /// Whether it says that it may be executed twice.
    pub(crate) is_idempotent: bool,
}

/// What a method returns, in its `Result` if it has one.
pub(crate) enum Returns {
    Value(Box<Type>),
    /// Items of this type.
    Stream(Box<Type>),
}

/// Errors, collected.
#[derive(Default)]
struct Errors(Option<Error>);

impl Errors {
    fn push(&mut self, error: Error) {
        match &mut self.0 {
            Some(errors) => errors.combine(error),
            none => *none = Some(error),
        }
    }

    fn take<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.push(error)).ok()
    }
}

impl Service {
    pub(crate) fn parse(arguments: TokenStream, item: TokenStream) -> Result<Service> {
        let item: ItemTrait = syn::parse2(item).map_err(|error| Error::new(error.span(), "a service is a trait"))?;
        let mut errors = Errors::default();
        let (name, version, is_checked) = errors.take(header(arguments, &item.ident)).unwrap_or_default();
        if !item.generics.params.is_empty() || item.generics.where_clause.is_some() {
            let what = "a service has no parameters: each of them would be another service";
            errors.push(Error::new(item.generics.span(), what));
        }
        if let Some(token) = item.unsafety.map(|token| token.span).or(item.auto_token.map(|token| token.span)) {
            errors.push(Error::new(token, "a service is a plain trait"));
        }
        let mut methods = Vec::new();
        for item in item.items {
            let method = match item {
                TraitItem::Fn(method) => Method::parse(method),
                other => Err(Error::new(other.span(), "a service has methods and nothing else")),
            };
            methods.extend(errors.take(method));
        }
        match errors.0 {
            Some(errors) => Err(errors),
            None => Ok(Service {
                attributes: item.attrs,
                visibility: item.vis,
                ident: item.ident,
                supertraits: item.supertraits,
                name,
                version,
                is_checked,
                methods,
            }),
        }
    }
}

/// The service's name and version, and whether it is checked.
fn header(arguments: TokenStream, ident: &Ident) -> Result<(String, u32, bool)> {
    let (mut name, mut version, mut checked) = (None, None, None);
    let parser = syn::meta::parser(|meta| {
        if meta.path.is_ident("name") {
            let text: LitStr = meta.value()?.parse()?;
            if text.value().is_empty() || text.value().len() > MAX_NAME {
                return Err(Error::new(text.span(), format!("the name of a service has 1 to {MAX_NAME} bytes")));
            }
            return once(&mut name, text.value(), meta.path.span());
        }
        if meta.path.is_ident("version") {
            let number: LitInt = meta.value()?.parse()?;
            return once(&mut version, number.base10_parse()?, meta.path.span());
        }
        if meta.path.is_ident("checked") {
            return once(&mut checked, (), meta.path.span());
        }
        Err(meta.error("a service has a `name` and a `version`, and may be `checked`"))
    });
    syn::parse::Parser::parse2(parser, arguments)?;
    let name = name.unwrap_or_else(|| snake_case(&ident.to_string()));
    Ok((name, version.unwrap_or(1), checked.is_some()))
}

/// Sets what may be said once.
pub(crate) fn once<T>(place: &mut Option<T>, value: T, span: Span) -> Result<()> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(Error::new(span, "this was said already")),
    }
}

fn snake_case(name: &str) -> String {
    let mut snake = String::new();
    for (at, letter) in name.char_indices() {
        if letter.is_uppercase() && at > 0 {
            snake.push('_');
        }
        snake.extend(letter.to_lowercase());
    }
    snake
}

impl Method {
    fn parse(method: TraitItemFn) -> Result<Method> {
        let TraitItemFn { mut attrs, sig, default, .. } = method;
        if !sig.generics.params.is_empty() || sig.generics.where_clause.is_some() {
            let what = "a method of a service has no parameters: what it takes is known to both sides; \
                        references need no names for their lifetimes";
            return Err(Error::new(sig.generics.span(), what));
        }
        if let Some(what) = sig.unsafety.map(|token| token.span).or(sig.abi.as_ref().map(Spanned::span)) {
            return Err(Error::new(what, "a method of a service is called from elsewhere: it is a plain function"));
        }
        let price = Price::take(&mut attrs)?;
        let is_idempotent = take_idempotent(&mut attrs)?;
        let is_async = sig.asyncness.is_some();
        let mut inputs = sig.inputs.into_iter();
        match inputs.next() {
            Some(FnArg::Receiver(receiver)) if is_shared_self(&receiver) => {}
            Some(other) => return Err(Error::new(other.span(), "a method of a service begins with `&self`")),
            None => return Err(Error::new(sig.ident.span(), "a method of a service begins with `&self`")),
        }
        let mut arguments = inputs.map(argument).collect::<Result<Vec<_>>>()?;
        let context = arguments.first().is_some_and(|(_, of)| is_context(of)).then(|| arguments.remove(0));
        if let Some((_, of)) = arguments.iter().find(|(_, of)| is_context(of)) {
            return Err(Error::new(of.span(), "the context is the first argument behind `&self`"));
        }
        let (returns, error) = returned(&sig.output)?;
        if !is_async && (error.is_some() || matches!(returns, Returns::Value(_))) {
            let what = "a method of a service is `async`, or returns `impl Stream<Item = …>`";
            return Err(Error::new(sig.fn_token.span, what));
        }
        if let (Some(with), Returns::Stream(_)) = (price.as_ref().and_then(Price::with), &returns) {
            let what = "what a stream costs is known when it ends, and its method has answered by then: \
                        give it a price for items or bytes, or commit its cost by `CallContext::reservation`";
            return Err(Error::new_spanned(with, what));
        }
        let output = match &sig.output {
            ReturnType::Default => quote::quote!(()),
            ReturnType::Type(_, output) => output.to_token_stream(),
        };
        Ok(Method {
            attributes: attrs,
            ident: sig.ident,
            context,
            arguments,
            is_async,
            returns,
            error,
            output,
            default,
            price,
            is_idempotent,
        })
    }

    /// What the wire has of it, as text.
    pub(crate) fn signature(&self) -> String {
        let arguments = self.arguments.iter().map(|(_, of)| of.to_token_stream().to_string());
        let signature = format!("{}({})->{}", self.ident, arguments.collect::<Vec<_>>().join(","), self.output);
        signature.split_whitespace().collect()
    }

    /// The attributes without which a part of the service is not there.
    pub(crate) fn conditions(&self) -> impl Iterator<Item = &Attribute> {
        self.attributes.iter().filter(|attribute| attribute.path().is_ident("cfg"))
    }
}

/// Takes `#[idempotent]` out of a method's attributes.
fn take_idempotent(attributes: &mut Vec<Attribute>) -> Result<bool> {
    let mut found = None;
    for attribute in attributes.extract_if(.., |attribute| attribute.path().is_ident("idempotent")) {
        attribute.meta.require_path_only()?;
        once(&mut found, (), attribute.pound_token.span)?;
    }
    Ok(found.is_some())
}

fn is_shared_self(receiver: &syn::Receiver) -> bool {
    receiver.reference.is_some() && receiver.mutability.is_none() && receiver.colon_token.is_none()
}

fn argument(argument: FnArg) -> Result<(Ident, Type)> {
    let FnArg::Typed(typed) = argument else {
        return Err(Error::new(argument.span(), "`self` comes first"));
    };
    let Pat::Ident(name) = &*typed.pat else {
        return Err(Error::new(typed.pat.span(), "an argument of a service has a name of its own"));
    };
    match &*typed.ty {
        Type::Reference(reference) if reference.mutability.is_some() => {
            let what = "an argument travels to the server: what is changed there does not come back";
            Err(Error::new(typed.ty.span(), what))
        }
        Type::ImplTrait(_) => Err(Error::new(typed.ty.span(), "an argument travels: both sides must know its type")),
        _ => Ok((name.ident.clone(), (*typed.ty).clone())),
    }
}

fn is_context(of: &Type) -> bool {
    matches!(of, Type::Reference(reference) if last_segment(&reference.elem).is_some_and(|it| it.ident == "CallContext"))
}

fn last_segment(of: &Type) -> Option<&syn::PathSegment> {
    match of {
        Type::Path(path) if path.qself.is_none() => path.path.segments.last(),
        _ => None,
    }
}

/// What is returned, and the error if it is a `Result`.
fn returned(output: &ReturnType) -> Result<(Returns, Option<Type>)> {
    let ReturnType::Type(_, output) = output else {
        return Ok((Returns::Value(Box::new(syn::parse_quote!(()))), None));
    };
    let Some(segment) = last_segment(output).filter(|segment| segment.ident == "Result") else {
        return Ok((owned(output)?, None));
    };
    let types: Vec<&Type> = match &segment.arguments {
        PathArguments::AngleBracketed(arguments) => arguments.args.iter().filter_map(type_of).collect(),
        _ => Vec::new(),
    };
    match types[..] {
        [value, error] => {
            if let Returns::Stream(_) = owned(error)? {
                return Err(Error::new(error.span(), "an error is a value"));
            }
            Ok((owned(value)?, Some(error.clone())))
        }
        _ => Err(Error::new(output.span(), "a result states its error, too: `Result<T, E>`")),
    }
}

fn type_of(argument: &GenericArgument) -> Option<&Type> {
    match argument {
        GenericArgument::Type(of) => Some(of),
        _ => None,
    }
}

fn owned(of: &Type) -> Result<Returns> {
    match of {
        Type::Reference(_) => Err(Error::new(of.span(), "what is returned travels to the client, which owns it")),
        Type::ImplTrait(bounds) => item_of(bounds).map(|item| Returns::Stream(Box::new(item))),
        _ => Ok(Returns::Value(Box::new(of.clone()))),
    }
}

/// The `T` of an `impl Stream<Item = T>`.
fn item_of(bounds: &TypeImplTrait) -> Result<Type> {
    let segments = bounds.bounds.iter().filter_map(|bound| match bound {
        TypeParamBound::Trait(bound) => bound.path.segments.last(),
        _ => None,
    });
    for segment in segments.filter(|segment| segment.ident == "Stream") {
        let PathArguments::AngleBracketed(arguments) = &segment.arguments else { continue };
        for argument in &arguments.args {
            if let GenericArgument::AssocType(item) = argument
                && item.ident == "Item"
            {
                return match &item.ty {
                    Type::ImplTrait(_) => Err(Error::new(item.ty.span(), "both sides must know the type of the items")),
                    Type::Reference(_) => {
                        Err(Error::new(item.ty.span(), "an item travels to the client, which owns it"))
                    }
                    of => Ok(of.clone()),
                };
            }
        }
    }
    Err(Error::new(bounds.span(), "a method returns a value, or `impl Stream<Item = …>`"))
}
